"""Cells without a study: patches of one model scored on tasks, the model loaded once; nothing is kept."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from portllm.errors import PortllmError, ResolveError, StageError
from portllm.formats import lmeval
from portllm.formats.adapter import read_adapter
from portllm.study.limits import check_room
from portllm.study.recipes import Dtype, Evaluate, Requests
from portllm.work.context import RunContext
from portllm.work.evaluate import evaluate
from portllm.work.requests import requests
from portllm.work.resident import require_removable
from portllm.work.source import Source
from portllm.work.tokenizing import load_tokenizer, window
from portllm.work.versions import Versions


@dataclass(frozen=True)
class Asked:
    """Which tasks, and how they are scored."""

    tasks: Sequence[str]
    """Tasks, groups or tags of lm-eval, or of `include`."""
    data_root: Path | None = None
    """DIR/<task>/{train,validation}.parquet replaces the hub's data."""
    include: Path | None = None
    """Directory with task YAMLs of the user's own."""
    num_fewshot: int | None = None
    limit: int | None = None
    apply: Literal["merged", "adapter"] = "merged"
    dtype: Dtype = "float32"
    device: str = "cpu"


@dataclass(frozen=True)
class Summed:
    """One patch (or none) on one task, or on a group of them."""

    patch: Path | None
    rank: int | None
    task: str
    summary: dict[str, Any]
    """As the stage `evaluate` returns it."""


@dataclass(frozen=True)
class Scored(Summed):
    """On a task, with its documents."""

    items: pa.Table


@dataclass(frozen=True)
class At:
    """How far the scoring is."""

    cell: int
    """The cell at work, from 1."""
    cells: int
    task: str
    patch: Path | None
    done: int = 0
    """Requests of this cell."""
    total: int | None = None
    """None until its first ones are done."""


def score(
    model: Path, patches: Sequence[Path], asked: Asked, told: Callable[[At], None] = lambda at: None
) -> Iterator[Scored]:
    """Every patch on every task, or the model itself where there is no patch.

    `told` hears of each cell when it begins and whenever some of its requests are done.

    Raises `ResolveError` for a model, patch, task or data that cannot be used, before anything is loaded. A cell that
    cannot be scored does not stop the others: StageError at the end, with a line for each, naming task and patch.
    """
    checked = _checked(model, patches, asked)
    ranks = {patch: max((t.rank for t in read_adapter(patch).targets.values()), default=None) for patch in patches}
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="portllm-")))
        run = RunContext(root, Versions(), device=asked.device, log=lambda line: None)
        stack.callback(run.versions.close)
        failures: list[StageError] = []
        made: dict[str, dict[str, Path]] = {}
        for task, given in checked.items():
            with _gathering(failures, task):
                made[task] = _requests(model, task, given, asked, root, run)
        each: list[Path | None] = [*patches] or [None]
        cells = list(product(each, made))
        for number, (patch, task) in enumerate(cells, 1):
            at = At(number, len(cells), task, patch)
            told(at)
            applied = {"patch1": patch} if patch else {}
            out = root / "cells" / str(number)
            scales = (1.0,) * len(applied)
            recipe = Evaluate(version("lm_eval"), asked.apply if applied else "merged", asked.dtype, scales)
            with _gathering(failures, f"{task} with {patch}" if patch else task):
                summary = evaluate(recipe, {"root": model, **made[task], **applied}, out, _telling(run, at, told))
                items = pq.read_table(out / "items.parquet")
                yield Scored(patch, ranks[patch] if patch else None, task, summary, items)
        if failures:
            raise StageError("\n".join(map(str, failures))) from failures[0]


@contextmanager
def _gathering(failures: list[StageError], name: str) -> Iterator[None]:
    """Whatever fails in a task or cell is one error that names it, for the end."""
    try:
        yield
    except Exception as error:
        said = str(error) if isinstance(error, PortllmError) else f"{type(error).__name__}: {error}"
        failures.append(StageError(f"{name}: {said}"))
        failures[-1].__cause__ = error


def _telling(run: RunContext, at: At, told: Callable[[At], None]) -> RunContext:
    return replace(run, progress=lambda done, total, **_: told(replace(at, done=done, total=total)))


def _checked(model: Path, patches: Sequence[Path], asked: Asked) -> dict[str, dict[str, Path]]:
    """Definition and data of every task, all of it looked at."""
    Source.read(model, [])
    tokenizer = _tokenizer(model)
    for patch in patches:
        Source.read(model, [(patch, 1.0)])
        if asked.apply == "adapter":
            require_removable(read_adapter(patch))
    found: dict[str, dict[str, Path]] = {}
    for name in asked.tasks:
        for task in lmeval.expand(name, asked.include):
            given = {"definition": asked.include} if asked.include else {}
            if asked.data_root is not None:
                data = lmeval.data_directory(asked.data_root, task, asked.include)
                given |= {"data": data} if data else {}
            source = lmeval.TaskSource(task, asked.include, given.get("data"), num_fewshot=asked.num_fewshot)
            if new_tokens := lmeval.check(source).new_tokens:
                check_room(task, new_tokens, window(model, tokenizer))
            found[task] = given
    return found


def _tokenizer(model: Path) -> Any:
    try:
        return load_tokenizer(model)
    except StageError as error:
        raise ResolveError(str(error).splitlines()[0]) from error


def _requests(
    model: Path, task: str, given: dict[str, Path], asked: Asked, root: Path, run: RunContext
) -> dict[str, Path]:
    out = root / "requests" / task
    recipe = Requests(task, "evaluate", version("lm_eval"), num_fewshot=asked.num_fewshot, limit=asked.limit)
    requests(recipe, {"tokenizer": model, **given}, out, run)
    return {"requests": out, **given}
