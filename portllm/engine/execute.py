"""One step executed in this process: attempt → stage → publish; for a warm worker and for `portllm step`."""

import contextlib
import gc
import importlib
import os
import resource
import shutil
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from portllm import __version__
from portllm.engine.failures import Failure
from portllm.engine.preemption import training
from portllm.errors import EngineError
from portllm.store.store import Store
from portllm.study.steps import TRAININGS, Plan, Step
from portllm.work.context import RunContext, Summary

STAGES = {
    "base": "portllm.work.base",
    "corpus": "portllm.work.corpora",
    "requests": "portllm.work.requests",
    "update": "portllm.work.update",
    "finetune": "portllm.work.finetune",
    "evaluate": "portllm.work.evaluate",
    "export": "portllm.work.export",
    "diagnose": "portllm.work.foresight",
}
"""Module of each stage's function, which bears the stage's name; imported where it runs."""


@dataclass(frozen=True)
class Job:
    """A step with everything a process needs to execute it."""

    step: Step
    inputs: Mapping[str, Path]
    store: Path


@dataclass(frozen=True)
class Outcome:
    """What one execution came to."""

    key: str
    ok: bool
    wall_s: float
    summary: Summary = field(default_factory=dict)
    failure: Failure | None = None
    loads: int = 0
    """Times this execution loaded a model's weights."""
    host: str = ""
    pid: int = 0
    started: float = 0.0


def job_for(step: Step, plan: Plan, store: Store) -> Job:
    """Where a step's inputs lie: given things in their place, the rest in the store."""
    return Job(step, {role: _place(key, plan, store) for role, key in step.inputs.items()}, store.root)


def _place(key: str, plan: Plan, store: Store) -> Path:
    given = plan.givens.get(key)
    return Path(given.path) if given else store.path(plan.steps[key].stage, key)


def stage_function(stage: str) -> Any:
    """The function of a stage."""
    return getattr(importlib.import_module(STAGES[stage]), stage)


def perform(job: Job, attempt: Path, context: RunContext) -> Summary:
    """A step's stage function in this process; one that trains hears of SIGTERM."""
    _check_device(job.step, context)
    with training() if job.step.stage in TRAININGS else contextlib.nullcontext():
        summary: Summary = stage_function(job.step.stage)(job.step.recipe, job.inputs, attempt, context)
    return summary


def _check_device(step: Step, context: RunContext) -> None:
    if context.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise EngineError(
                f"{step.label} was given a GPU on {socket.gethostname()}, where torch {torch.__version__} finds no "
                f"CUDA: install torch's CUDA build and a driver there, or -o resources.{step.stage}.gpus=0"
            )


def execute(job: Job, context: RunContext) -> Outcome:
    """Run a step in this process and publish it; every error becomes an outcome."""

    def work(attempt: Path, log: Path) -> tuple[Summary, int]:
        before = context.versions.loads
        with logging_to(log, context):
            summary = perform(job, attempt, context)
        return summary, context.versions.loads - before

    return attempted(job, work)


def attempted(job: Job, work: Callable[[Path, Path], tuple[Summary, int]]) -> Outcome:
    """One attempt: `work(directory, log)` gives a summary and a count of model loads; then it is published."""
    store, step = Store(job.store), job.step
    started, clock = time.time(), time.monotonic()
    attempt = store.new_attempt(step.key)
    log = store.paths.log(step.key, attempt.name.rsplit(".", 1)[-1])
    failure: Failure | None = None
    where: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid(), "started": started}
    try:
        store.begin(attempt)
        log.parent.mkdir(parents=True, exist_ok=True)
        summary, loads = work(attempt, log)
        wall = time.monotonic() - clock
        store.publish(attempt, step.stage, step.key, make_record(step, summary, wall, started))
        shutil.rmtree(store.paths.work(step.key), ignore_errors=True)
    except Exception as error:
        store.discard(attempt)
        failure = failure_of(error, log)
    if failure is not None:
        free_memory()
        return Outcome(step.key, False, time.monotonic() - clock, failure=failure, **where)
    return Outcome(step.key, True, wall, summary, loads=loads, **where)


def free_memory() -> None:
    """What a failed stage held lies in reference cycles: an engine with weights, masters and moments (measured: 116 MB
    after a full update of 17 MB). The next attempt, in this very process, must not have less than this one had."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        with contextlib.suppress(RuntimeError):  # a lost context
            torch.cuda.empty_cache()


def make_record(step: Step, summary: Summary, wall: float, started: float) -> dict[str, Any]:
    """What is kept beside a published output. Its times are those of a training that ran in one piece.

    `device_s`: seconds times devices of all attempts that it goes on from, which may have had others than the last.
    """
    earlier, layout = summary.get("earlier_s", 0.0), step.layout
    earlier_device_s = summary.get("earlier_rank_s", 0.0) * (layout.devices / layout.workers)
    return {
        "stage": step.stage,
        "label": step.label,
        "payload": step.payload(),
        "summary": summary,
        "wall_s": wall + earlier,
        "devices": layout.devices,
        "device_s": wall * layout.devices + earlier_device_s,
        "started": started - earlier,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "portllm": __version__,
        "resources": vars(step.layout),
        "expected": {"device_s": round(step.cost.device_s, 3), "memory_bytes": step.cost.memory},
        "peak_process_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def failure_of(error: BaseException, log: Path) -> Failure:
    """An error as a value; its traceback also ends the step's log."""
    tail = "".join(traceback.format_exception(error))[-4000:]
    with contextlib.suppress(OSError), log.open("a") as file:
        file.write(tail)
    return Failure(type(error).__name__, str(error), tail, str(log))


@contextlib.contextmanager
def logging_to(path: Path, context: RunContext) -> Iterator[None]:
    """The context's log goes to the step's own file, line by line."""
    before = context.log
    with path.open("a", buffering=1) as file:
        context.log = lambda line: print(time.strftime("%H:%M:%S"), line, file=file)
        try:
            yield
        finally:
            context.log = before
