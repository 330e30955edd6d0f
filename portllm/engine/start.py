"""A run from end to end: requirements of this machine, the cluster, the runner, the mirror."""

from __future__ import annotations

import shutil
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portllm.errors import EngineError
from portllm.store.results import published_rows, training
from portllm.store.store import Store
from portllm.study.spec import Study
from portllm.study.steps import TRAININGS, Cell, Plan, Step

if TYPE_CHECKING:
    from portllm.engine.watch import Line
    from portllm.track.mlflow_mirror import Mirror

GRACE_S = 25.0
"""Seconds that trainings get to keep their state after SIGTERM: Kubernetes kills after 30."""
CURVE_S = 5.0
"""Seconds between two pieces of a running training's curve in MLflow; a shorter one gets there when published."""
SLOW_BF16 = (
    "note: this processor has no bfloat16 units; a bfloat16 product ran 70 times slower than float32 on such a one: "
    "consider dtype: float32"
)


def nothing_to_do() -> dict[str, Any]:
    """The report of a run that found everything published."""
    return {
        "executed": [],
        "steps_executed": 0,
        "failed": {},
        "blocked": [],
        "evaluation_loads": 0,
        "training_loads": 0,
        "process_starts": 0,
        "evaluators": 0,
        "versions": 0,
        "wall_s": 0.0,
    }


def run_plan(
    study: Study, plan: Plan, store: Store, address: str | None, quiet: bool, show: Callable[[], list[Path]]
) -> dict[str, Any]:
    """Run what is missing; returns what was done as JSON values.

    `show` writes the study's results and report once the cells are there; MLflow gets the files it returns.
    """
    # By listings: looked up one by one, names that do not exist yet would stay so on NFS, for up to a minute.
    done = store.published(step.stage for step in plan.steps.values())
    missing = [step for step in plan.steps.values() if step.key not in done]
    _require_compiler(missing)
    if not quiet and not address and _slow_bf16(missing):
        print(SLOW_BF16, file=sys.stderr)
    from portllm.engine.cluster import connected
    from portllm.engine.progress import Progress
    from portllm.engine.runner import Runner
    from portllm.track.study import open_mirror

    started = time.monotonic()
    mirror = open_mirror(study, store)
    try:
        with connected(address) as budget, Progress(len(plan.steps), quiet) as progress:
            terminated = _listen()  # after Ray, which brings a handler of its own
            publish = _publisher(mirror, plan, store)
            for step in plan.steps.values():
                if step.key in done:  # by an earlier run, which may have been killed before it told MLflow
                    publish(step)
            runner = Runner(plan, store, budget, progress, publish, _watcher(mirror))
            try:
                report = runner.run()
            except KeyboardInterrupt:
                if terminated():
                    runner.stop(GRACE_S)
                raise
        shown = _shown(show)
        if mirror is not None:
            for path in shown:
                mirror.artifact(path)
    finally:
        _close(mirror, quiet)
    report.wall_s = round(time.monotonic() - started, 2)
    _say(plan, report, shown, quiet)
    return {
        **vars(report),
        "steps_executed": len(report.executed),
        "failed": {key: {"label": plan.steps[key].label, **vars(failure)} for key, failure in report.failed.items()},
    }


def _listen() -> Callable[[], bool]:
    """Takes SIGTERM (a container ends, a scheduler wants the machine back) as an interrupt; tells whether it came.

    By a flag, since Ray raises KeyboardInterrupt from its waiting, whatever the handler raised.
    """
    came = threading.Event()

    def heard(*_: object) -> None:
        came.set()
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, heard)
    return came.is_set


def _require_compiler(missing: Sequence[Step]) -> None:
    """DeepSpeed compiles its CPU op at the first use, unless it was built in (as `make env` does)."""
    trains = any(step.stage in TRAININGS for step in missing)
    if trains and not any(map(shutil.which, ("c++", "g++", "clang++"))) and not _op_is_built_in():
        raise EngineError(
            "no C++ compiler (g++ or clang++), which DeepSpeed needs at its first use: install one, for example "
            "`apt-get install g++`"
        )


def _shown(show: Callable[[], list[Path]]) -> list[Path]:
    """The files written; a full disk must not hide what the run did."""
    try:
        return show()
    except OSError as error:
        print(f"results and report were not written: {error}", file=sys.stderr)
        return []


def _op_is_built_in() -> bool:
    """Looked up beside the package: importing DeepSpeed costs seconds."""
    found = find_spec("deepspeed")
    return bool(found and found.origin and any(Path(found.origin).parent.glob("ops/comm/deepspeed_shm_comm_op*.so")))


def _slow_bf16(missing: Sequence[Step]) -> bool:
    """Whether steps to run compute in bfloat16 on this machine's CPU, and it has no units for it."""
    dtypes = {getattr(getattr(s.recipe, "optimization", s.recipe), "dtype", None) for s in missing if not s.layout.gpus}
    if "bfloat16" not in dtypes or not Path("/proc/cpuinfo").is_file():
        return False
    return not {"avx512_bf16", "amx_bf16", "bf16"} & set(Path("/proc/cpuinfo").read_text().split())


def _publisher(mirror: Mirror | None, plan: Plan, store: Store) -> Callable[[Step], None]:
    """Hands a publication to the mirror's queue."""
    cells: dict[str, list[Cell]] = defaultdict(list)
    for cell in plan.cells:
        cells[cell.key].append(cell)

    def published(step: Step) -> None:
        if mirror is not None and step.stage in TRAININGS:
            mirror.training(training(step, store))
        elif mirror is not None and step.stage == "evaluate":
            mirror.cell(published_rows(cells[step.key], store))

    return published


def _watcher(mirror: Mirror | None) -> Callable[[Step, list[Line]], None]:
    """Hands the curves of running trainings to the mirror's queue, every few seconds."""
    from portllm.track.study import begun

    waiting: dict[str, list[Line]] = defaultdict(list)
    handed: dict[str, float] = {}

    def watched(step: Step, lines: list[Line]) -> None:
        if mirror is None or step.stage not in TRAININGS:
            return
        waiting[step.key] += lines
        now = time.monotonic()
        if now - handed.setdefault(step.key, now) >= CURVE_S:
            handed[step.key] = now
            mirror.watch(begun(step), waiting.pop(step.key))

    return watched


def _close(mirror: Mirror | None, quiet: bool) -> None:
    if mirror is not None:
        for warning in mirror.close(timeout=60):
            if not quiet:
                print(
                    f"tracking: {warning} (the study is not affected; `portllm track` writes it again)", file=sys.stderr
                )


def _say(plan: Plan, report: Any, shown: list[Path], quiet: bool) -> None:
    if quiet:
        return
    text = f"{plan.name}: {len(report.executed)} steps in {report.wall_s:.0f} s"
    text += "".join(f"\n  {path}" for path in shown)
    failed = [(plan.steps[key].label, failure) for key, failure in report.failed.items()]
    if failed:
        text += f"; {len(report.failed)} failed, {len(report.blocked)} wait for them:\n"
        text += "\n".join(f"  {label}: {f.type}: {f.message}\n    log: {f.log}" for label, f in failed)
        text += "\nthe same command tries again"
    print(text, file=sys.stderr)
