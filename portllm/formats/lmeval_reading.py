"""How a task reads a document: as one that is evaluated, and as a few-shot example in the prompts of others."""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from typing import Any, NamedTuple

from portllm.formats.lmeval_build import Task, TaskSource, file_of


class Reading(NamedTuple):
    """Templates, functions or constants, as lm-eval takes them; None where the task has none."""

    text: Any
    target: Any
    choice: Any
    prefix: Any
    description: Any = None

    def asked(self, task: Task, doc: dict[str, Any]) -> Any:
        return task.doc_to_text(doc) if _own_way(task, "doc_to_text") else task.doc_to_text(doc, self.text)

    def answer(self, task: Task, doc: dict[str, Any]) -> Any:
        own = _own_way(task, "doc_to_target")
        return task.doc_to_target(doc) if own else task.doc_to_target(doc, self.target)

    def choices(self, task: Task, doc: dict[str, Any]) -> list[Any]:
        return list(task.doc_to_choice(doc, self.choice)) if self.choice is not None else []

    def texts(self, task: Task, doc: dict[str, Any]) -> list[str]:
        """All that a request may say of the document. Raises what a template or function of the task raises."""
        bare = [task.resolve_field(doc, field) or "" for field in (self.prefix, self.description)]
        said = [self.asked(task, doc), self.answer(task, doc), *self.choices(task, doc)]
        return [str(text) for text in (*bare, *said)]


def _own_way(task: Task, method: str) -> bool:
    """Whether a task that is a Python class reads documents itself, in one way, by no template."""
    return _arguments(getattr(type(task), method)) == len(("self", "doc"))


@functools.cache
def _arguments(function: Any) -> int:
    return len(inspect.signature(function).parameters)


def of_request(task: Task) -> Reading:
    """How an evaluated document is read, and a training document."""
    c = task.config
    return Reading(c.doc_to_text, c.doc_to_target, c.doc_to_choice, c.gen_prefix, c.description or None)


def of_example(task: Task) -> Reading:
    """How a few-shot example is read: like an evaluated document where fewshot_config says nothing else."""
    shown, c = task.fewshot_cfg, task.config
    text = c.doc_to_text if shown.doc_to_text is None else shown.doc_to_text
    target = c.doc_to_target if shown.doc_to_target is None else shown.doc_to_target
    return Reading(text, target, shown.doc_to_choice or None, shown.gen_prefix)


def build_example(task: Task, doc: dict[str, Any], read: Reading) -> str:
    """A few-shot example's text, as lm-eval builds it."""
    text, choices = read.asked(task, doc), read.choices(task, doc) or None
    messages = task.build_qa_turn(
        q=choices[text] if task.multiple_input and choices else text,
        c=None if task.multiple_input else choices,
        a=read.answer(task, doc),
        gen_prefix=task.resolve_field(doc, read.prefix),
        tgt_delim=task.fewshot_cfg.target_delimiter,
        few_delim=task.fewshot_cfg.fewshot_delimiter,
    )
    return "".join(message.to_text() for message in messages)


def file_of_split(task: Task, source: TaskSource, split: str) -> str:
    """Where a split's documents lie, in words (`lmeval_build.local_splits`)."""
    if split == (task.config.test_split or task.config.validation_split):
        return file_of(source, False)
    if source.data is None:
        return f"the split `{split}`"
    own = Path(source.data) / f"{split}.parquet"
    return str(own) if own.is_file() and split != "validation" else file_of(source, True)


def file_of_examples(task: Task, source: TaskSource) -> str:
    """Where the documents lie that few-shot examples are drawn from, in words."""
    shown, c = task.fewshot_cfg, task.config
    if shown.split is None and shown.samples is not None:
        return "its fewshot_config.samples"
    return file_of_split(task, source, shown.split or c.training_split or c.validation_split or c.test_split)


def most_shots(task: Task, evaluated: list[dict[str, Any]]) -> int:
    """Few-shot examples that each of the evaluated documents can have.

    Where lm-eval leaves the evaluated document out, its default sampler draws one more than it needs, whether or not
    the document is among those drawn from.
    """
    from lm_eval.api.samplers import FirstNSampler

    pool, shots = task.sampler.df, task.config.num_fewshot
    if task.fewshot_cfg.split != task.config.test_split:
        return len(pool)
    spare = 0 if isinstance(task.sampler, FirstNSampler) else 1
    if len(pool) > 2 * shots + 1:  # no document is half of them
        return len(pool) - spare
    return len(pool) - max(spare, *(pool.count(doc) for doc in evaluated))
