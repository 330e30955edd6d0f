"""`resolve`: everything a study names, looked at once; and a cache, so that looking again costs only stat calls."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.metadata import version as package_version
from pathlib import Path

from portllm import __version__
from portllm.errors import ResolveError, SpecError
from portllm.resolve.corpora import corpus_facts, screened
from portllm.resolve.digests import DigestCache, cache_directory, stat_signature, write_cache
from portllm.resolve.lock import apply_lock, hub_ids, lock_path, read_lock
from portllm.resolve.models import model_facts, patch_facts, pinned, version_facts
from portllm.resolve.own_deepspeed import own_configurations
from portllm.resolve.source import Sources
from portllm.study.conversion import with_members
from portllm.study.facts import CorpusFacts, Facts, ModelFacts, PatchFacts, TaskFacts, from_json, to_json
from portllm.study.spec import Study, load


def open_study(file: Path, overrides: Sequence[str] = ()) -> tuple[Study, Facts]:
    """A study file validated and everything it names resolved; raises SpecError or ResolveError."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(
            f"{file}: cannot be read as a study file: {getattr(error, 'strerror', None) or error}"
        ) from None
    study, document = load(text, str(file), overrides)
    pins = read_lock(file)
    study = apply_lock(study, pins)
    remembered = _Remembered(file, text, overrides)
    facts = remembered.load()
    if facts is None:
        sources = Sources(file.resolve().parent, DigestCache())
        try:
            facts = resolve(study, sources, pins)
        except (SpecError, ResolveError) as error:
            raise type(error)(document.located(str(error))) from None
        sources.digests.save()
        remembered.save(facts, sources.seen)
    return with_members(study, facts.groups), facts


def resolve(study: Study, sources: Sources, pins: Mapping[str, str]) -> Facts:
    """Look at everything a study names; `pins` are the lock's."""
    from portllm.resolve import tasks as task_rooms

    groups = task_rooms.groups(study, sources)
    study = with_members(study, groups)
    models = {name: model_facts(name, model, sources) for name, model in study.models.items()}
    versions = _versions(study, models, sources)
    patches = _patches(study, models, sources)
    corpora = {name: corpus_facts(name, corpus, sources) for name, corpus in study.corpora.items()}
    tasks = {task.task: task_rooms.task_facts(study, task, sources, pins) for task in study.tasks}
    prompts = cache(lambda: task_rooms.evaluated_prompts(study, sources))
    corpora = _screened(study, corpora, tasks, prompts, sources)
    return Facts(
        lm_eval=package_version("lm_eval"),
        models=models,
        corpora=corpora,
        tasks=tasks,
        patches=patches,
        versions=versions,
        groups=groups,
        deepspeed=own_configurations(study, sources),
        unpinned=tuple(unpinned(study, tasks)),
        notes=(*_notes(corpora), *_shots(study, tasks)),
    )


def unpinned(study: Study, tasks: dict[str, TaskFacts]) -> list[str]:
    """Hub ids without a commit."""
    return hub_ids(study, {n: t.dataset for n, t in tasks.items() if not pinned(t.revision)})


def _versions(study: Study, models: dict[str, ModelFacts], sources: Sources) -> dict[tuple[str, int], ModelFacts]:
    found = {}
    for name, lineage in study.lineages.items():
        for i, update in enumerate(lineage.updates):
            if update.path:
                where = f"lineages.{name}.updates[{i}].path"
                found[name, i] = version_facts(where, update.path, models[lineage.model], sources)
            elif update.hub:
                found[name, i] = replace(models[lineage.model], root=None)
    return found


def _patches(study: Study, models: dict[str, ModelFacts], sources: Sources) -> dict[tuple[str, int], PatchFacts]:
    found = {}
    for task, patches in study.patches.items():
        for i, patch in enumerate(patches):
            meant = {n: m for n, m in models.items() if patch.model in (None, n)}
            found[task, i] = patch_facts(f"patches.{task}[{i}]", patch.path, meant, sources)
    return found


def _screened(
    study: Study,
    corpora: dict[str, CorpusFacts],
    tasks: dict[str, TaskFacts],
    prompts: Callable[[], Iterable[str]],
    sources: Sources,
) -> dict[str, CorpusFacts]:
    """Corpora at hand without the documents that hold an evaluated prompt; the result is remembered by content."""
    evaluated = sorted((n, t.config, t.data.key if t.data else "") for n, t in tasks.items())
    result = {}
    at_the_hub = any(task.data is None and task.dataset for task in tasks.values())
    for name, facts in corpora.items():
        if facts.screened:
            corpus = study.corpora[name]
            content = [facts.source.key if facts.source else "", corpus.model_dump(mode="json"), evaluated]
            facts = _cached(content, facts, lambda c=corpus, f=facts, n=name: screened(n, c, f, prompts))  # type: ignore[misc]
        # Prompts of tasks at the hub are not known yet: the corpus step screens once more, from the tasks' requests.
        result[name] = replace(facts, screened=facts.screened and not at_the_hub)
    return result


def _cached(content: object, facts: CorpusFacts, screen: Callable[[], CorpusFacts]) -> CorpusFacts:
    digest = hashlib.sha256(json.dumps(["screen", 2, package_version("lm_eval"), content], sort_keys=True).encode())
    path = cache_directory() / "screen" / f"{digest.hexdigest()}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(path.read_bytes())
        return replace(facts, excluded=tuple(known["excluded"]), most_tokens=known["most_tokens"])
    found = screen()
    write_cache(path, {"excluded": found.excluded, "most_tokens": found.most_tokens})
    return found


def _notes(corpora: dict[str, CorpusFacts]) -> list[str]:
    return [
        f"corpus {name}: {len(facts.excluded)} documents hold an evaluated prompt and are left out"
        for name, facts in corpora.items()
        if facts.excluded
    ]


def _shots(study: Study, tasks: dict[str, TaskFacts]) -> list[str]:
    return [
        f"task {task.task}: its definition says num_fewshot {own}, and lm-eval keeps to that"
        for task in study.tasks
        if (own := tasks[task.task].num_fewshot) != task.num_fewshot and task.num_fewshot is not None
    ]


class _Remembered:
    """Facts of a study file as of the last plan, valid while every file looked at is unchanged."""

    def __init__(self, file: Path, text: str, overrides: Sequence[str]) -> None:
        lock = lock_path(file)
        pins = lock.read_text() if lock.is_file() else ""
        here = str(Path.cwd())  # where the relative data of a task's definition start
        identity = [__version__, package_version("lm_eval"), str(file.resolve()), here, text, list(overrides), pins]
        self.path = cache_directory() / "facts" / f"{hashlib.sha256(json.dumps(identity).encode()).hexdigest()}.json"

    def load(self) -> Facts | None:
        try:
            data = json.loads(self.path.read_bytes())
            if all(stat_signature(Path(p)) == s for p, s in data["seen"].items()):
                return from_json(data["facts"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return None

    def save(self, facts: Facts, seen: dict[str, str]) -> None:
        write_cache(self.path, {"seen": seen, "facts": to_json(facts)})
