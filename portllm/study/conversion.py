"""A study's fields as recipes and layouts."""

from portllm.study import recipes as r
from portllm.study.resources import Layout
from portllm.study.spec import Corpus, Optimizer, StageResources


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


def layout_of(resources: StageResources) -> Layout:
    return Layout(**resources.model_dump())
