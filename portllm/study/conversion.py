"""A study's fields as recipes and layouts, and its groups as their tasks."""

from collections.abc import Mapping, Sequence

from portllm.errors import SpecError
from portllm.study import recipes as r
from portllm.study.complaints import did_you_mean
from portllm.study.facts import Facts
from portllm.study.own_deepspeed import laid_over
from portllm.study.resources import Layout
from portllm.study.spec import Corpus, Optimizer, Study


def text_recipe(corpus: Corpus, format: r.Format | None) -> r.Text:
    """A corpus of the study as a recipe."""
    return r.Text(
        format=format,
        text=corpus.text,
        template=corpus.template,
        hub=corpus.hub,
        subset=corpus.subset,
        revision=(corpus.revision or "unpinned") if corpus.hub else None,
        split=corpus.split,
        generator=corpus.generator,
        documents=corpus.documents,
        options=corpus.options,
        seed=corpus.seed,
    )


def optimization(fields: Optimizer, learning_rate: float, seed: int) -> r.Optimization:
    return r.Optimization(
        learning_rate=learning_rate,
        batch=fields.batch,
        seed=seed,
        schedule=fields.schedule,
        warmup=fields.warmup,
        weight_decay=fields.weight_decay,
        clip=fields.clip,
        dtype=fields.dtype,
    )


def lora_recipe(rank: int, alpha: float | None, targets: str | list[str]) -> r.Lora:
    named = targets if isinstance(targets, str) else tuple(targets)
    return r.Lora(rank=rank, alpha=float(2 * rank if alpha is None else alpha), targets=named)


def layout_of(stage: str, study: Study, facts: Facts, lora: bool = False) -> Layout:
    """Resources of a stage, with the user's own DeepSpeed configuration."""
    resources = getattr(study.resources, stage)
    layout, where = Layout(**resources.model_dump(exclude={"deepspeed"})), f"resources.{stage}.zero"
    if stage in facts.deepspeed:
        where = f"resources.{stage}.deepspeed: {resources.deepspeed}"
        layout = laid_over(layout, facts.deepspeed[stage], where)
    if lora and layout.zero == 3:
        raise SpecError(f"{where}: ZeRO-3 with LoRA can save empty adapters (peft #2892); use zero: 2")
    return layout


def with_members(study: Study, groups: Mapping[str, Sequence[str]]) -> Study:
    """The study with the tasks of each group or tag in its place, each with the group's settings, patches and exports.

    A task's own patches come instead of its group's. Raises SpecError where a task then stands twice, a patch is for no
    task, or nothing says how a patch is trained.
    """
    tasks = [
        task.model_copy(update={"task": member})
        for task in study.tasks
        for member in groups.get(task.task, [task.task])
    ]
    names = [task.task for task in tasks]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise SpecError(f"tasks: `{twice}` stands twice, by itself or in groups")
    spread = {member: given for name, given in study.patches.items() for member in groups.get(name, [])}
    patches = spread | {name: given for name, given in study.patches.items() if name not in groups}
    export = [
        choice.model_copy(update={"task": member})
        for choice in study.export
        for member in groups.get(choice.task or "", [choice.task])
    ]
    study = study.model_copy(update={"tasks": tasks, "patches": patches, "export": export})
    _check_patches(study, names)
    return study


def _check_patches(study: Study, names: Sequence[str]) -> None:
    for task in study.patches:
        if task not in names:
            raise SpecError(f"patches.{task}: `{task}` is not defined{did_you_mean(task, names)}")
    trained = {"refit", "warm"} & set(study.arms) or ("port" in study.arms and set(names) - set(study.patches))
    if trained and study.finetune is None:
        raise SpecError("finetune: arms port, warm and refit train patches: give finetune")
