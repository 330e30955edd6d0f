"""What a user sees of a run: one live line and a few counts on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from portllm.engine.schedule import Schedule
    from portllm.study.steps import Step


LEFT_OUT = {
    "dropped_leaks": "training rows are evaluated documents and were left out",
    "dropped_long": "training rows are longer than the model reads and were left out",
    "truncated": "requests were cut to the model's window",
}
"""Counts of a step's summary that a user should see at once."""


@dataclass
class Progress:
    """Lines to stderr, so that stdout stays for results."""

    total: int
    quiet: bool = False
    live: Any = None
    started: float = 0.0

    def __enter__(self) -> Progress:
        self.started = time.monotonic()
        if not self.quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            self.live = Live(console=Console(stderr=True), refresh_per_second=4, transient=True)
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()

    def line(self, text: str) -> None:
        """One line that stays."""
        if self.quiet:
            return
        if self.live is not None:
            self.live.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def done(self, step: Step, wall: float, summary: Mapping[str, Any], schedule: Schedule, before: int) -> None:
        """A step was published; what it left out is said."""
        count = len(schedule.published)
        notes = "".join(f"; {n} {words}" for name, words in LEFT_OUT.items() if (n := summary.get(name)))
        self.line(f"[{count}/{self.total}] {step.label}  {wall:.1f} s{notes}")
        self.show(schedule, before)

    def show(self, schedule: Schedule, before: int) -> None:
        """Refresh the live line; `before`: steps published before this run."""
        if self.live is None:
            return
        running = [schedule.plan.steps[key].label for key in sorted(schedule.running)]
        done = len(schedule.published)
        left = _left(time.monotonic() - self.started, done - before, self.total - done)
        failed = f" · {len(schedule.failed)} failed" if schedule.failed else ""
        ready = len(schedule.ready) + sum(map(len, schedule.cells.values()))
        self.live.update(
            f"{done}/{self.total} done · {len(running)} running · {ready + schedule.waiting} waiting"
            f"{failed} · {left}\n  " + "\n  ".join(running)
        )


def _left(elapsed: float, done: int, remaining: int) -> str:
    if done == 0:
        return "time left unknown"
    seconds = elapsed / done * remaining
    return f"about {seconds / 60:.0f} min left" if seconds >= 90 else f"about {seconds:.0f} s left"
