"""The plan: a study expanded into steps, deduplicated by key, and the cells that read them. Pure.

Study coordinates (arm, t, lineage) are names in the plan and never part of a key: `port` at t = 0 is `refit` at t = 0,
and `none` has neither rank nor seed, so each is one step however many cells read it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from portllm.errors import SpecError
from portllm.study import recipes as r
from portllm.study.conversion import layout_of, lora_recipe, optimization, text_recipe
from portllm.study.estimate import cost
from portllm.study.facts import Facts, Given, PatchFacts, TaskFacts
from portllm.study.keys import step_key
from portllm.study.limits import (
    check_corpus,
    check_dropout,
    check_init_dropout,
    check_length,
    check_lora,
    check_patch_dropout,
    check_room,
)
from portllm.study.resources import Layout, Trains, zero_stage
from portllm.study.spec import (
    ApplyMode,
    ExportChoice,
    Finetune,
    Init,
    Study,
    Task,
    Update,
)
from portllm.study.steps import Cell, Diagnosis, Plan, Step, Version

LEARNING_RATE = {"lora": 2e-4, "full": 2e-5}
"""Peak learning rate of an update that names none."""


def make_plan(study: Study, facts: Facts) -> Plan:
    """Expand a study. Raises SpecError for what can never run."""
    return _Planner(study, facts).plan()


class _Planner:
    """Collects steps while walking the study once, lineage by lineage."""

    def __init__(self, study: Study, facts: Facts) -> None:
        self.study = study
        self.facts = facts
        self.steps: dict[str, Step] = {}
        self.givens: dict[str, Given] = {}
        self.cells: dict[Cell, None] = {}
        self.diagnoses: dict[Diagnosis, None] = {}
        self.exported: set[ExportChoice] = set()
        self.version_zero: dict[str, Version] = {}
        self.notes = dict.fromkeys(facts.notes)
        self._layout = cache(lambda stage, lora=False: layout_of(stage, study, facts, lora))

    def plan(self) -> Plan:
        for name, lineage in self.study.lineages.items():
            for seed in lineage.seeds:
                self._lineage(name, seed)
        self._check_exports()
        priced = {key: replace(step, cost=cost(step, self.facts, self.steps)) for key, step in self.steps.items()}
        return Plan(
            self.study.name,
            priced,
            tuple(self.cells),
            self.givens,
            tuple(self.diagnoses),
            self.facts.unpinned,
            tuple(self.notes),
        )

    # --- the walk

    def _lineage(self, name: str, update_seed: int) -> None:
        versions = list(self._versions(name, update_seed))
        for task in self.study.tasks:
            for mode in self.study.evaluate.apply:
                for version in versions:
                    self._cells(name, update_seed, versions[0], version, task, mode)
            for version in versions[1:] if self.study.diagnose else ():
                self._diagnose(name, update_seed, versions[0], version, task)

    def _versions(self, name: str, seed: int) -> Iterator[Version]:
        lineage = self.study.lineages[name]
        version = self._zero(lineage.model)
        yield version
        position: dict[str, int] = {}
        for i, update in enumerate(lineage.updates):
            for _ in range(update.steps):
                version = self._next(name, i, update, version, position, seed)
                yield version

    def _cells(
        self, lineage: str, update_seed: int, zero: Version, version: Version, task: Task, mode: ApplyMode
    ) -> None:
        modes = self.study.evaluate.apply
        for arm in self.study.arms if mode == modes[0] else [arm for arm in self.study.arms if arm != "none"]:
            for source, patches, rank, seed in self._patches(lineage, update_seed, arm, zero, version, task):
                model = self.study.lineages[lineage].model
                label = f"{self._name(lineage, version, update_seed)} {task.task} {arm}{_suffix(rank, seed)}"
                label += f" {mode}" if len(modes) > 1 and patches else ""
                step = self._evaluate(version, patches, task, mode, label, model)
                facts = self.facts.tasks[task.task]
                self.cells[
                    Cell(
                        model=model,
                        lineage=lineage,
                        t=version.t,
                        update=version.update,
                        update_seed=update_seed if version.trained else None,
                        task=task.task,
                        num_fewshot=facts.num_fewshot,
                        arm=arm,
                        source_t=source,
                        rank=rank,
                        seed=seed,
                        patches=patches,
                        apply=mode,
                        dtype=self.study.evaluate.dtype,
                        key=step,
                        version_key=version.key,
                    )
                ] = None
                self._export(lineage, version, task, arm, rank, seed, patches)

    def _name(self, lineage: str, version: Version, update_seed: int) -> str:
        """A version in labels; θ₀ belongs to the model, not to a lineage."""
        if not version.t:
            return f"{self.study.lineages[lineage].model} t=0"
        several = version.trained and len(self.study.lineages[lineage].seeds) > 1
        return f"{lineage}{f' u{update_seed}' if several else ''} t={version.t}"

    def _of(self, version: Version) -> str:
        """A model in the labels of what its tokenizer made, where the study has several."""
        model = next((name for name, zero in self.version_zero.items() if zero.tokenizer == version.tokenizer), "")
        return f"{model} " if len(self.study.models) > 1 else ""

    def _patches(
        self, lineage: str, update_seed: int, arm: str, zero: Version, version: Version, task: Task
    ) -> Iterator[tuple[int | None, tuple[str, ...], int | None, int | None]]:
        """(source t, patch keys, rank, seed) of an arm at a version."""
        if arm == "none":
            yield None, (), None, None
            return
        given = list(self._given_patches(lineage, task)) if arm in ("port", "warm") else []
        recipe = None if given and arm == "port" else self._finetune_fields(lineage, task)
        for facts in given:
            key, rank = self._give(facts.root), facts.rank
            if recipe is None or not version.t:
                yield 0, (key,), rank, None
                continue
            check_patch_dropout(facts, f"patches.{task.task}")
            for seed in recipe.seeds:
                warm = self._finetune(lineage, update_seed, version, task, recipe, rank, seed, start=key)
                yield version.t, (warm,), rank, seed
        if given or recipe is None:
            return
        source = version if arm == "refit" else zero
        if arm == "refit":
            self._note_ranks(lineage, task, recipe)
        for rank in recipe.rank:
            for seed in recipe.seeds:
                key = self._finetune(lineage, update_seed, source, task, recipe, rank, seed)
                if arm == "warm" and version.t:
                    key = self._finetune(lineage, update_seed, version, task, recipe, rank, seed, start=key)
                yield version.t if arm == "warm" else source.t, (key,), rank, seed

    def _note_ranks(self, lineage: str, task: Task, recipe: Finetune) -> None:
        refits = " and ".join(map(str, recipe.rank))
        for facts in self._given_patches(lineage, task):
            if facts.rank not in recipe.rank:
                note = f"a given patch of rank {facts.rank} is compared with refits of rank {refits} (finetune.rank)"
                self.notes[f"task {task.task}: {note}"] = None

    def _given_patches(self, lineage: str, task: Task) -> Iterator[PatchFacts]:
        for i, patch in enumerate(self.study.patches.get(task.task, [])):
            if patch.model in (None, self.study.lineages[lineage].model):
                yield self.facts.patches[task.task, i]

    def _diagnose(self, lineage: str, update_seed: int, zero: Version, version: Version, task: Task) -> None:
        """Every ported patch on a version, beside the refit of the same rank and seed where there is one."""
        asked = "refit" in self.study.arms
        refits = self._patches(lineage, update_seed, "refit", zero, version, task) if asked else ()
        others = {(rank, seed): patches[0] for _, patches, rank, seed in refits}
        for _, (patch,), rank, seed in self._patches(lineage, update_seed, "port", zero, version, task):
            other = {"other": others[rank, seed]} if (rank, seed) in others else {}
            inputs = version.inputs | {"zero": zero.root, "patch1": patch} | other
            model = self.study.lineages[lineage].model
            label = f"diagnose {self._name(lineage, version, update_seed)} {task.task}{_suffix(rank, seed)}"
            key = self._add("diagnose", r.Diagnose(), inputs, label, model=model, task=task.task)
            trained_with = update_seed if version.trained else None
            at = (model, lineage, version.t, version.update, trained_with, task.task, rank, seed)
            self.diagnoses[Diagnosis(*at, key)] = None

    # --- steps

    def _add(
        self,
        stage: str,
        recipe: Any,
        inputs: Mapping[str, str],
        label: str,
        layout: Layout = Layout(),
        **coordinates: Any,
    ) -> str:
        key = step_key(stage, recipe, inputs)
        if training := getattr(recipe, "optimization", None):
            trains: Trains = "lora" if getattr(recipe, "lora", None) else "full"
            zero_stage(layout, layout.workers, trains, training.dtype)  # refuses what could not be trained
        if key not in self.steps:
            self.steps[key] = Step(key, stage, label, recipe, dict(inputs), layout, coordinates)
        return key

    def _give(self, given: Given) -> str:
        self.givens[given.key] = given
        return given.key

    def _zero(self, name: str) -> Version:
        if name not in self.version_zero:
            self.version_zero[name] = self._base(name)
        return self.version_zero[name]

    def _base(self, name: str) -> Version:
        model, facts = self.study.models[name], self.facts.models[name]
        if facts.root is not None and facts.tokenizer is not None:
            return Version(0, self._give(facts.root), tokenizer=self._give(facts.tokenizer), facts=facts)
        recipe = r.Base(source="gguf", storage=facts.storage)
        inputs: dict[str, str] = {}
        if model.hub:
            recipe = replace(recipe, source="hub", hub=model.hub, revision=model.revision or "unpinned")
        elif model.init:
            check_length(model.init.sequence_length, facts, f"models.{name}.init.sequence_length")
            check_init_dropout(facts, f"models.{name}.init.config")
            held = self.facts.corpora[model.init.corpus].most_tokens
            check_corpus(model.init.corpus, held, model.init.tokens, f"models.{name}.init.tokens")
            recipe, inputs = self._init(model.init, facts.storage)
        elif facts.source is not None:
            inputs = {"source": self._give(facts.source)}
        layout = self._layout("base")
        key = self._add("base", recipe, inputs, f"base {name}", layout, model=name)
        return Version(0, key, tokenizer=key, facts=facts)

    def _init(self, init: Init, storage: r.Dtype) -> tuple[r.Base, dict[str, str]]:
        corpus, facts = self.study.corpora[init.corpus], self.facts.corpora[init.corpus]
        if not facts.screened:
            raise SpecError(
                f"models.*.init.corpus: `{init.corpus}` cannot be screened against the evaluated documents before the "
                "tokenizer exists: pretraining needs a corpus and task data that are at hand"
            )
        recipe = r.Base(
            source="init",
            storage=storage,
            model_type=init.model_type,
            config=init.config,
            tokenizer=init.tokenizer,
            vocabulary=init.vocabulary,
            text=text_recipe(corpus, facts.format),
            excluded=facts.excluded,
            tokens=init.tokens,
            sequence_length=init.sequence_length,
            optimization=optimization(init, init.learning_rate, init.seed),
        )
        return recipe, {"source": self._give(facts.source)} if facts.source else {}

    def _next(
        self, lineage: str, i: int, update: Update, version: Version, position: dict[str, int], seed: int
    ) -> Version:
        t = version.t + 1
        if update.given:
            return self._given_version(lineage, i, update, version)
        assert update.corpus is not None and update.method is not None and update.tokens is not None
        where = f"lineages.{lineage}.updates[{i}]"
        check_length(update.sequence_length, version.facts, f"{where}.sequence_length")
        check_dropout(version.facts, where)
        lora = lora_recipe(update.rank, update.alpha, update.targets) if update.method == "lora" else None
        if lora:
            check_lora(lora, version.facts, where)
        replay = tuple(_slice(position, name, round(share * update.tokens)) for name, share in update.replay.items())
        own = _slice(position, update.corpus, update.tokens - sum(part.tokens for part in replay))
        for name in (update.corpus, *update.replay):
            check_corpus(name, self.facts.corpora[name].most_tokens, position[name], f"{where}.tokens")
        recipe = r.Update(
            method=update.method,
            tokens=own.tokens,
            sequence_length=update.sequence_length,
            start=own.start,
            replay=replay,
            optimization=optimization(update, update.learning_rate or LEARNING_RATE[update.method], seed),
            lora=lora,
        )
        inputs = version.inputs | {"corpus": self._corpus(update.corpus, version)}
        inputs |= {f"replay{n}": self._corpus(name, version) for n, name in enumerate(update.replay, 1)}
        key = self._add(
            "update",
            recipe,
            inputs,
            "update " + self._name(lineage, replace(version, t=t, update=update.method), seed),
            self._layout("update", lora is not None),
            lineage=lineage,
            t=t,
            update_seed=seed,
            model=self.study.lineages[lineage].model,
        )
        if update.method == "lora":
            return replace(version, t=t, deltas=(*version.deltas, key), update="lora")
        return replace(version, t=t, root=key, deltas=(), update="full")

    def _given_version(self, lineage: str, i: int, update: Update, version: Version) -> Version:
        facts = self.facts.versions[lineage, i]
        if facts.root is not None:
            root = self._give(facts.root)
        else:
            recipe = r.Base(source="hub", hub=update.hub, revision=update.revision or "unpinned", storage=facts.storage)
            at = {"model": self.study.lineages[lineage].model, "lineage": lineage}
            root = self._add("base", recipe, {}, f"base {lineage} t={version.t + 1}", Layout(), **at)
        return replace(version, t=version.t + 1, root=root, deltas=(), update="given", facts=facts)

    def _corpus(self, name: str, version: Version) -> str:
        corpus, facts = self.study.corpora[name], self.facts.corpora[name]
        inputs = {"tokenizer": version.tokenizer}
        if facts.source is not None:
            inputs["source"] = self._give(facts.source)
        if not facts.screened:
            for i, task in enumerate(self.study.tasks, 1):
                inputs[f"screen{i}"] = self._requests(task, version, whole=True)
        recipe = r.Corpus(text_recipe(corpus, facts.format), facts.excluded)
        label = f"corpus {self._of(version)}{name}"
        return self._add("corpus", recipe, inputs, label, self._layout("corpus"), corpus=name)

    def _requests(self, task: Task, version: Version, whole: bool = False) -> str:
        """Evaluation requests; `whole` ignores limit and few-shot settings: every document, for screening."""
        facts = self.facts.tasks[task.task]
        recipe = r.Requests(
            task=task.task,
            split="evaluate",
            lm_eval=self.facts.lm_eval,
            config=facts.config,
            dataset=facts.dataset,
            revision=facts.revision,
            num_fewshot=0 if whole else task.num_fewshot,
            limit=None if whole else task.limit,
        )
        inputs = {"tokenizer": version.tokenizer} | self._task_inputs(facts)
        return self._add(
            "requests",
            recipe,
            inputs,
            f"requests {self._of(version)}{task.task}{' whole' if whole else ''}",
            task=task.task,
        )

    def _examples(self, task: Task, version: Version, examples: int | None) -> str:
        facts = self.facts.tasks[task.task]
        if facts.data is not None and not facts.training:
            raise SpecError(
                f"task `{task.task}` has no training documents: a patch cannot be trained on it; add "
                f"train.parquet to its data, or give a patch under patches"
            )
        recipe = r.Requests(
            task=task.task,
            split="train",
            lm_eval=self.facts.lm_eval,
            config=facts.config,
            dataset=facts.dataset,
            revision=facts.revision,
            examples=examples,
            window=(version.facts.shape.max_positions or None) if version.facts and version.facts.shape else None,
        )
        inputs = {"tokenizer": version.tokenizer} | self._task_inputs(facts)
        twins = [
            other
            for other in self.study.tasks
            if other.task != task.task and self.facts.tasks[other.task].template == facts.template
        ]
        for i, twin in enumerate(twins, 1):
            inputs[f"screen{i}"] = self._requests(twin, version, whole=True)
        return self._add("requests", recipe, inputs, f"examples {self._of(version)}{task.task}", task=task.task)

    def _task_inputs(self, facts: TaskFacts) -> dict[str, str]:
        given = {"definition": facts.definition, "data": facts.data}
        return {role: self._give(value) for role, value in given.items() if value is not None}

    def _finetune_fields(self, lineage: str, task: Task) -> Finetune:
        if self.study.finetune is None:
            raise SpecError(
                f"lineage `{lineage}`, task `{task.task}`: no patch under patches fits its model: give finetune"
            )
        model = self.study.models[self.study.lineages[lineage].model]
        return self.study.finetune.changed(model.finetune, task.finetune)

    def _finetune(
        self, lineage: str, update_seed: int, version: Version, task: Task, fields: Finetune, rank: int, seed: int,
        start: str | None = None,
    ) -> str:  # fmt: skip
        """A patch trained on a version, from nothing or, with fewer steps, from the patch `start`."""
        lora = lora_recipe(rank, fields.alpha, fields.targets)
        check_lora(lora, version.facts, f"finetune (task {task.task})")
        check_dropout(version.facts, f"finetune (task {task.task})")
        epochs = fields.epochs if fields.epochs or fields.steps else 1.0
        recipe = r.Finetune(
            lora=lora,
            epochs=epochs,
            steps=fields.steps,
            share=fields.warm if start else 1.0,
            optimization=optimization(fields, fields.learning_rate, seed),
        )
        inputs = version.inputs | {"examples": self._examples(task, version, fields.examples)}
        inputs |= {"patch1": start} if start else {}
        label = f"{self._name(lineage, version, update_seed)} {task.task}{_suffix(rank, seed)}"
        return self._add(
            "finetune",
            recipe,
            inputs,
            f"{'warm' if start else 'finetune'} {label}",
            self._layout("finetune", lora=True),
            model=self.study.lineages[lineage].model,
            lineage=lineage,
            t=version.t,
            task=task.task,
            rank=rank,
            seed=seed,
            **({"update_seed": update_seed} if version.trained else {}),
            **({"arm": "warm"} if start else {}),
        )

    def _evaluate(
        self, version: Version, patches: tuple[str, ...], task: Task, mode: ApplyMode, label: str, model: str
    ) -> str:
        settings, facts = self.study.evaluate, self.facts.tasks[task.task]
        if version.facts and version.facts.shape:
            check_room(task.task, facts.new_tokens, version.facts.shape.max_positions)
        recipe = r.Evaluate(
            lm_eval=self.facts.lm_eval,
            apply=mode if patches else "merged",
            dtype=settings.dtype,
            scales=(1.0,) * len(patches),
            score_tokens=settings.score_tokens,
        )
        inputs = version.inputs | {f"patch{i}": key for i, key in enumerate(patches, 1)}
        inputs |= {"requests": self._requests(task, version)} | self._task_inputs(facts)
        return self._add(
            "evaluate",
            recipe,
            inputs,
            f"evaluate {label}",
            self._layout("evaluate"),
            model=model,
            task=task.task,
        )

    def _export(
        self,
        lineage: str,
        version: Version,
        task: Task,
        arm: str,
        rank: int | None,
        seed: int | None,
        patches: tuple[str, ...],
    ) -> None:
        at = {"lineage": lineage, "t": version.t, "task": task.task, "arm": arm, "rank": rank, "seed": seed}
        chosen = [choice for choice in self.study.export if _matches(choice, at)]
        self.exported.update(chosen)
        if chosen:
            inputs = version.inputs | {f"patch{i}": key for i, key in enumerate(patches, 1)}
            inputs["tokenizer"] = version.tokenizer
            label = f"export {lineage} t={version.t} {task.task} {arm}"
            at["model"] = self.study.lineages[lineage].model
            self._add("export", r.Export(scales=(1.0,) * len(patches)), inputs, label, Layout(), **at)

    def _check_exports(self) -> None:
        for choice in self.study.export:
            if choice not in self.exported:
                said = choice.model_dump(exclude_none=True)
                nowhere = [name for name, value in said.items() if all(getattr(c, name) != value for c in self.cells)]
                names = ", ".join(f"{name} {said[name]}" for name in nowhere or said)
                raise SpecError(f"export: no planned cell has {names}")


def _slice(position: dict[str, int], corpus: str, tokens: int) -> r.Slice:
    """The next tokens of a corpus in a lineage: chained updates take consecutive slices."""
    start = position.get(corpus, 0)
    position[corpus] = start + tokens
    return r.Slice(start, tokens)


def _suffix(rank: int | None, seed: int | None) -> str:
    return (f" r{rank}" if rank is not None else "") + (f" s{seed}" if seed is not None else "")


def _matches(choice: ExportChoice, at: Mapping[str, Any]) -> bool:
    return all(value is None or at[name] == value for name, value in choice.model_dump().items())
