"""What a user sees of a run: one live line and a few counts on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from portllm.engine.schedule import Schedule
    from portllm.engine.watch import Watch
    from portllm.study.steps import Step


LEFT_OUT = {
    "dropped_leaks": "training rows are evaluated documents and were left out",
    "dropped_long": "training rows are longer than the model reads and were left out",
    "truncated": "requests were cut to the model's window",
    "halved": "times memory ran out, and less was done at once",
}
"""Counts of a step's summary that a user should see at once."""
EVERY = 60.0
"""Seconds between two lines about what is running, where there is no terminal to redraw."""


@dataclass
class Progress:
    """Lines to stderr, so that stdout stays for results."""

    total: int
    quiet: bool = False
    live: Any = None
    started: float = 0.0
    said: float = 0.0
    """When what is running was last written in plain lines."""

    def __enter__(self) -> Progress:
        self.started = self.said = time.monotonic()
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

    def done(self, step: Step, wall: float, summary: Mapping[str, Any], schedule: Schedule) -> None:
        """A step was published; what it left out is said."""
        count = len(schedule.published)
        notes = "".join(f"; {n} {words}" for name, words in LEFT_OUT.items() if (n := summary.get(name)))
        self.line(f"[{count}/{self.total}] {step.label}  {wall:.1f} s{notes}")

    def show(self, schedule: Schedule, before: int, watches: Mapping[str, Watch]) -> None:
        """What is running, and how far it is; `before`: steps published before this run."""
        running = [far(schedule.plan.steps[key].label, watches[key].last) for key in sorted(schedule.running)]
        if self.live is None:
            self._say(running)
            return
        done = len(schedule.published)
        longest = max((watches[key].left for key in schedule.running), default=0.0)
        left = _left(time.monotonic() - self.started, done - before, self.total - done, longest)
        failed = f" · {len(schedule.failed)} failed" if schedule.failed else ""
        ready = len(schedule.ready) + sum(map(len, schedule.cells.values()))
        from rich.text import Text

        counts = f"{done}/{self.total} done · {len(running)} running · {ready + schedule.waiting} waiting"
        self.live.update(Text("\n  ".join([f"{counts}{failed} · {left}", *running])))  # Text: no markup, no colours

    def _say(self, running: Sequence[str]) -> None:
        """Now and then, in plain lines: a training of hours is not silence in a job's log."""
        if time.monotonic() - self.said >= EVERY:
            self.said = time.monotonic()
            for text in running:
                self.line(f"  {text}")


def far(label: str, line: Mapping[str, Any] | None) -> str:
    """A running step and how far it is: `finetune:sst2/s1  12/120 · loss 0.693 · 950 tokens/s`."""
    if line is None:
        return label
    so_far = f"{line['done']}/{line['total']}"
    curve = [f"loss {line['loss']:.3f}", f"{line['tokens_per_s']:,.0f} tokens/s"] if "loss" in line else []
    return f"{label}  {' · '.join([so_far, *curve])}"


def one_line(label: str) -> Callable[..., None]:
    """A `RunContext.progress` for a single step on a terminal: one line, drawn over itself."""

    def show(done: int, total: int, **values: float) -> None:
        text = far(label, {"done": done, "total": total, **values})
        print(f"\r\x1b[K{text}", end="\n" if done == total else "", file=sys.stderr, flush=True)

    return show


def _left(elapsed: float, done: int, remaining: int, longest: float) -> str:
    """By the steps done so far, and at least what the `longest` of the running ones will take yet."""
    if done == 0 and not longest:
        return "time left unknown"
    seconds = max(elapsed / done * remaining if done else 0.0, longest)
    return f"about {seconds / 60:.0f} min left" if seconds >= 90 else f"about {seconds:.0f} s left"
