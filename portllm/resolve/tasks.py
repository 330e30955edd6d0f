"""Tasks: what lm-eval says they are, with the study's data; remembered by content."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

from portllm.formats import lmeval
from portllm.formats.lmeval_data import from_hub
from portllm.formats.lmeval_generation import new_tokens
from portllm.formats.lmeval_index import definition_files, merged_config, scanned
from portllm.resolve.digests import cache_directory, write_cache
from portllm.resolve.source import Sources, about
from portllm.study.facts import Given, TaskFacts
from portllm.study.keys import digest, given_key
from portllm.study.spec import Study, Task


def task_facts(study: Study, task: Task, sources: Sources, pins: Mapping[str, str]) -> TaskFacts:
    """A task of the study; every refusal that its definition and data allow."""
    source = task_source(study, task, sources)
    where = lmeval.locate(task.task, source.definition)
    own_data = source.data is None
    for path in definition_files(where, own_data):
        sources.note(path)
    config = lmeval.definition_digest(where, data=own_data, sha256=sources.digests.file)
    facts = TaskFacts(definition=_definition(source, config), data=_data(source, sources), config=config)
    if facts.data is None and (dataset := _hub_dataset(source)):
        name = dataset.partition(":")[0]
        return replace(_offline(source, facts), dataset=dataset, revision=pins.get(f"dataset:{name}"))
    content = [
        "task",
        4,
        package_version("lm_eval"),
        source.name,
        config,
        facts.data.key if facts.data else "",
        task.num_fewshot,
    ]
    return _remembered(content, source, facts)


def groups(study: Study, sources: Sources) -> dict[str, tuple[str, ...]]:
    """The members of every group or tag among the study's tasks."""
    found = {}
    for root in {include for task in study.tasks if (include := _include(task, sources))}:
        for path in scanned(root):  # any file below it can change what a name stands for
            sources.note(path)
    for task in study.tasks:
        include = _include(task, sources)
        with about(f"task `{task.task}`"):
            members = lmeval.expand(task.task, include)
        if members != [task.task]:
            found[task.task] = tuple(members)
    return found


def _include(task: Task, sources: Sources) -> Path | None:
    return sources.directory(task.include_path, f"tasks.{task.task}.include_path") if task.include_path else None


def task_source(study: Study, task: Task, sources: Sources) -> lmeval.TaskSource:
    """Where a task's definition and data lie."""
    data = _data_directory(study, task, sources)
    return lmeval.TaskSource(task.task, _include(task, sources), data, num_fewshot=task.num_fewshot)


def evaluated_prompts(study: Study, sources: Sources) -> list[str]:
    """Folded prompts of every evaluated document whose data are at hand."""
    found: list[str] = []
    for task in study.tasks:
        source = task_source(study, task, sources)
        if source.data is not None or not _hub_dataset(source):
            found += lmeval.folded_prompts(lmeval.build(replace(source, num_fewshot=0)))
    return found


def _data_directory(study: Study, task: Task, sources: Sources) -> Path | None:
    if study.data_root is None:
        return None
    root = sources.directory(study.data_root, "data_root")
    return lmeval.data_directory(root, task.task, _include(task, sources))


def _definition(source: lmeval.TaskSource, config: str) -> Given | None:
    if source.definition is None:
        return None
    return Given(given_key("definition", config), str(source.definition), "definition")


def _data(source: lmeval.TaskSource, sources: Sources) -> Given | None:
    if source.data is None:
        return None
    sources.note(source.data)  # a file added later is news
    return sources.given("data", source.data, sorted(source.data.glob("*.parquet")))


def _hub_dataset(source: lmeval.TaskSource) -> str | None:
    """Hub data set of a task without data of its own: path, and after a colon the subset."""
    config = merged_config(lmeval.locate(source.name, source.definition))
    path, name = config.get("dataset_path"), config.get("dataset_name")
    if not from_hub(config):
        return None
    return f"{path}:{name}" if name else str(path)


def _offline(source: lmeval.TaskSource, facts: TaskFacts) -> TaskFacts:
    """What the YAML alone tells of a task whose data lie on the hub."""
    config = merged_config(lmeval.locate(source.name, source.definition))
    choices = config.get("doc_to_choice")
    metrics: list[dict[str, Any]] = config.get("metric_list") or [{"metric": "acc"}]
    own = config.get("num_fewshot")
    kind = str(config.get("output_type", "generate_until"))
    asked = config.get("generation_kwargs") or {}
    return replace(
        facts,
        output_type=kind,
        metric=str(metrics[0]["metric"]),
        num_fewshot=(own or 0) if source.num_fewshot is None or own == 0 else source.num_fewshot,
        choices=len(choices) if isinstance(choices, list) else 2,
        new_tokens=new_tokens(source.name, asked) if kind == "generate_until" else 0,
        template=str(config.get("doc_to_text", "")),
    )


def _remembered(content: list[Any], source: lmeval.TaskSource, facts: TaskFacts) -> TaskFacts:
    """The facts after looking at every document, from the cache where the same content was looked at before."""
    path = cache_directory() / "tasks" / f"{digest(content)}.json"
    with contextlib.suppress(OSError, ValueError, TypeError):
        return replace(facts, **json.loads(path.read_bytes()))
    found = dict(_checked(source))
    write_cache(path, found)
    return replace(facts, **found)


def _checked(source: lmeval.TaskSource) -> Iterator[tuple[str, Any]]:
    """Training documents are looked at as well wherever there are any."""
    facts = lmeval.check(source, training=_has_training(source))
    for name in ("output_type", "metric", "documents", "training", "num_fewshot", "choices", "new_tokens", "template"):
        yield name, getattr(facts, name)


def _has_training(source: lmeval.TaskSource) -> bool:
    return source.data is not None and (source.data / "train.parquet").is_file()
