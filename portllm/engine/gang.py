"""A training over several workers: Ray Train's TorchTrainer around the very same stage function."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import ray

from portllm.engine.execute import Job, Outcome, attempted, perform
from portllm.engine.preemption import listen
from portllm.engine.workers import accelerator, new_context, prepare
from portllm.errors import EngineError, PortllmError, out_of_memory
from portllm.work.context import Summary

RAY_TRAIN = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a process more for each training; the engine retries by itself
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # not 2: how late the end of a training is seen
}
"""Ray Train's settings, where the user's environment has none."""
NO_RETRIES: dict[str, Any] = {"max_failures": 0, "max_preemption_failures": 0, "controller_failure_limit": 0}
"""The engine decides (`engine/failures.py`): Ray Train alone would wait for a lost node's ranks for ever."""


@ray.remote(num_cpus=0, max_retries=0)
def run_gang(job: Job, nodes: list[str], scratch: str) -> Outcome:
    """Run a step's ranks under TorchTrainer, one per node named, and publish what they wrote; never raises."""

    def work(attempt: Path, log: Path) -> tuple[Summary, int]:
        try:
            summary = _fit(job, nodes, attempt, log, scratch)
        except Exception as error:
            raise _cause(error) from error
        finally:
            _summary_file(attempt).unlink(missing_ok=True)
            shutil.rmtree(_train_directory(job.store) / job.step.key[:16], ignore_errors=True)
        return summary, summary.pop("loads")

    return attempted(job, work)


def _fit(job: Job, nodes: list[str], attempt: Path, log: Path, scratch: str) -> dict[str, Any]:
    for name, value in RAY_TRAIN.items():
        os.environ.setdefault(name, value)
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    layout = job.step.layout
    gpus = layout.gpus > 0
    trainer = TorchTrainer(
        _rank,
        train_loop_config={"job": job, "attempt": str(attempt), "log": str(log), "scratch": scratch},
        scaling_config=ScalingConfig(
            num_workers=layout.workers,
            use_gpu=gpus,
            resources_per_worker={"CPU": layout.threads} | ({"GPU": layout.gpus} if gpus else {}),
            # Where the engine holds their capacity: Ray's own choice would leave what it counts free taken.
            label_selector=[{"ray.io/node-id": node} for node in nodes],  # type: ignore[call-arg]
        ),
        # By what the ranks hold: this process may be on a node without a GPU.
        torch_config=TorchConfig(backend="gloo" if accelerator(layout.gpus) == "cpu" else "cpu:gloo,cuda:nccl"),
        run_config=RunConfig(
            name=job.step.key[:16],
            storage_path=str(_train_directory(job.store)),
            failure_config=FailureConfig(**NO_RETRIES),
        ),
    )
    trainer.fit()
    return dict(json.loads(_summary_file(attempt).read_bytes()))


def _rank(config: dict[str, Any]) -> None:
    """One rank: the stage function in its own process, its log beside the others'."""
    from ray.train import get_context

    job: Job = config["job"]
    where = get_context()
    layout, scratch = job.step.layout, Path(config["scratch"])
    context = new_context(scratch, layout.threads, layout.gpus, where.get_world_rank(), where.get_world_size())
    prepare(context, job)
    _listen()
    with open(config["log"], "a", buffering=1) as file:
        context.log = lambda line: print(time.strftime("%H:%M:%S"), f"rank {context.rank}:", line, file=file)
        summary = perform(job, Path(config["attempt"]), context)
    if context.rank == 0:
        # Ray Train keeps the metrics of `report` only beside a checkpoint, so the summary goes through a file.
        _summary_file(Path(config["attempt"])).write_text(json.dumps(summary | {"loads": context.versions.loads}))


def _listen() -> None:
    """A rank trains in a thread of its process, and signals are handled in the main one, which serves the actor."""
    actor = ray.get_runtime_context().current_actor
    ray.get(actor.__ray_call__.remote(lambda _: listen()))


def _summary_file(attempt: Path) -> Path:
    """Beside the attempt, not in it: it is no part of what is published."""
    return attempt.with_name(f"{attempt.name}.summary")


def _train_directory(store: Path) -> Path:
    """What Ray Train itself writes; removed when the step ends."""
    return store / "work" / "train"


class WorkerDied(EngineError):
    """A rank's process ended, or could not be started: nothing about the step."""


def _cause(error: BaseException) -> BaseException:
    """The ranks' own error inside Ray Train's. Where one died, the others' broken connections tell nothing."""
    if start := getattr(error, "controller_failure", None):
        began = type(start).__name__ in ("WorkerGroupStartupTimeoutError", "WorkerGroupStartupFailedError")
        said = f"the ranks of the training did not start: {str(start).strip().splitlines()[0]}"
        return WorkerDied(said) if began else start
    failures = getattr(error, "worker_failures", None) or {}
    causes = [_inner(failure) for failure in failures.values()]
    told = next((cause for cause in causes if isinstance(cause, PortllmError)), None)
    died = next((cause for cause in causes if isinstance(cause, ray.exceptions.RayActorError)), None)
    if told is None and (gone := died or next((cause for cause in causes if _hung_up(cause)), None)):
        return WorkerDied(f"a rank of the training died: {str(gone).strip().splitlines()[0]}")
    return told or (causes[0] if causes else error.__cause__ or error)


def _hung_up(error: BaseException) -> bool:
    """Whether a rank lost another: it hears of a lost node at once, Ray after many seconds."""
    text = f"{type(error).__name__} {error}".lower()
    return any(words in text for words in _HUNG_UP) and not out_of_memory(type(error).__name__, str(error))


_HUNG_UP = (
    "connection closed by peer", "connection reset by peer", "connection refused", "broken pipe", "distbackenderror",
    "nccl communicator was aborted",
)  # fmt: skip


def _inner(failure: BaseException) -> BaseException:
    return getattr(failure, "cause", None) or getattr(failure, "health_check_failure", None) or failure
