"""Warm workers: long-lived Ray actors that imported the stack once and keep one version's weights resident."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from portllm.engine.execute import Job, Outcome, execute
from portllm.engine.pool import Size
from portllm.engine.preemption import listen, told
from portllm.engine.watch import Reporter
from portllm.store.layout import StoreLayout


@ray.remote(max_restarts=0, max_task_retries=0)
class Worker:
    """Executes one step at a time."""

    def __init__(self, scratch: str, threads: int, gpus: int) -> None:
        self.context = new_context(Path(scratch), threads, gpus)
        listen()

    def run(self, job: Job) -> Outcome:
        """Execute a step; never raises."""
        prepare(self.context, job)
        return execute(job, self.context)

    def end(self) -> None:
        """Leave in good order: a killed process takes its last second of Ray's events with it."""
        ray.actor.exit_actor()


def new_context(scratch: Path, threads: int, gpus: int, rank: int = 0, world: int = 1) -> Any:
    """A stage's surroundings in a fresh process."""
    parallel = "true" if threads > 1 else "false"
    os.environ |= {
        "OMP_NUM_THREADS": str(threads), "RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": parallel,
    }  # fmt: skip
    quiet_libraries()
    import torch

    from portllm.work.context import RunContext
    from portllm.work.versions import Versions

    torch.set_num_threads(threads)
    return RunContext(scratch, Versions(), rank=rank, world=world, device=accelerator(gpus), log=lambda _: None)


def prepare(context: Any, job: Job) -> None:
    """The context for this step."""
    step = job.step
    context.layout = step.layout
    context.about = {"key": step.key, "label": step.label, **step.coordinates}
    paths = StoreLayout(job.store)
    context.resume, stop = paths.work(step.key), paths.stop(step.key)
    context.stop = lambda: told() or listed(stop)
    if context.rank == 0:
        stop.unlink(missing_ok=True)  # told to the attempt before this one
        context.progress = Reporter(paths.watch(step.key))


def listed(path: Path) -> bool:
    """Whether a file is there, by its directory: NFS remembers for up to a minute that a name did not exist."""
    try:
        return path.name in os.listdir(path.parent)
    except OSError:
        return False


def accelerator(gpus: int) -> str:
    """`cuda` for a step that holds GPUs. With PORTLLM_LOGICAL_GPUS in a node's environment these are numbers only: a
    study can be tried where there are none."""
    return "cuda" if gpus and not os.environ.get("PORTLLM_LOGICAL_GPUS") else "cpu"


def quiet_libraries() -> None:
    """No progress bars or advice of other libraries in a worker's output; ninja is found beside the interpreter."""
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def start_worker(node: str, size: Size, scratch: Path) -> Any:
    """An actor on a node, holding exactly its size."""
    options = {
        "num_cpus": size.cpus,
        "num_gpus": size.gpus,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False),
    }
    return Worker.options(**options).remote(str(scratch), size.cpus, size.gpus)  # type: ignore[attr-defined]
