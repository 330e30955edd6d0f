"""What a stage function gets besides its recipe, inputs and output directory.

Every stage has one shape: `stage(recipe, inputs: Mapping[str, Path], out: Path, run: RunContext) -> Summary`. It reads
the paths in `inputs`, writes below `out`, logs through `run`, and returns a JSON-able summary for its record.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from portllm.study.resources import Layout

if TYPE_CHECKING:
    from portllm.work.versions import Resident, Versions

Summary = dict[str, Any]
"""JSON-able facts of one execution: counts, losses, ledger entries."""


class Progress(Protocol):
    """`done` of `total` optimizer steps of a training, or requests of an evaluation.

    A training's `values` are the point of its curve: `loss`, `learning_rate`, `grad_norm`, `tokens_per_s`, `elapsed_s`.
    """

    def __call__(self, done: int, total: int, **values: float) -> None: ...


def unheard(done: int, total: int, **values: float) -> None:
    """Nobody is told."""


@dataclass
class RunContext:
    """One execution's surroundings, handed to a stage by the engine, the command `step`, or a test."""

    scratch: Path
    """Directory of this node for caches: materialised versions live below it."""
    versions: Versions
    """This process's resident model: a cache of one."""
    layout: Layout = field(default_factory=Layout)
    rank: int = 0
    world: int = 1
    device: str = "cpu"
    resume: Path | None = None
    """Directory for a training's checkpoints, the same for every attempt at a step; None keeps none."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """The step's key and its names in the study: for provenance only."""
    log: Callable[[str], None] = print
    """One line of text for the step's log."""
    progress: Progress = unheard
    """Hears how far the step is."""
    stop: Callable[[], bool] = lambda: False
    """True once the step should end early (preemption): a training keeps its state first."""
    clock: Callable[[], float] = time.monotonic

    def open(self, inputs: Mapping[str, Path], dtype: str) -> Resident:
        """The version named by roles root, delta1, … in `inputs`, resident in this process in `dtype`."""
        return self.versions.open(inputs, dtype, self.device, self.scratch)
