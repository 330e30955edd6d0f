"""How far a running step is: written beside its work by whoever executes it, read by whoever shows it.

    STORE/work/<key>/watch.jsonl   {"done": 3, "total": 20, "loss": 1.93, "tokens_per_s": 950.0, …}: a line per report

The store is the one thing that every node reaches. A step shorter than PAUSE leaves no file.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PAUSE = 0.5
"""Seconds between two writes."""
Line = dict[str, Any]


class Reporter:
    """A step's `RunContext.progress`: keeps lines together, and writes them now and then."""

    def __init__(self, path: Path) -> None:
        self.path, self.lines, self.written_at = path, list[str](), time.monotonic()

    def __call__(self, done: int, total: int, **values: float) -> None:
        self.lines.append(json.dumps({"done": done, "total": total, **values}) + "\n")
        if time.monotonic() - self.written_at < PAUSE:
            return
        with contextlib.suppress(OSError):  # a full disk: the step does not need it
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.writelines(self.lines)
        self.lines, self.written_at = [], time.monotonic()


@dataclass
class Watch:
    """The driver's side: what was written since it last looked. What an earlier attempt wrote is forgotten."""

    path: Path
    read: int = 0
    """Bytes of whole lines."""
    last: Line | None = None
    begun: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        with contextlib.suppress(OSError):
            self.path.unlink()

    def news(self) -> list[Line]:
        """New lines, oldest first. What is no line (a full disk cut it, another driver began anew) is passed over."""
        try:
            with self.path.open("rb") as file:
                if os.fstat(file.fileno()).st_size < self.read:
                    self.read = 0
                file.seek(self.read)
                whole, newline, _ = file.read().rpartition(b"\n")
        except OSError:  # nothing yet, or published in this moment
            return []
        self.read += len(whole + newline)
        lines = []
        for line in whole.splitlines():
            with contextlib.suppress(ValueError):
                lines.append(json.loads(line))
        self.last = lines[-1] if lines else self.last
        return lines

    @property
    def left(self) -> float:
        """Seconds that the step will take yet, if it goes on as it did; 0 where it has not said anything."""
        if self.last is None:
            return 0.0
        done, total = self.last["done"], self.last["total"]
        return (time.monotonic() - self.begun) * (total - done) / max(done, 1)
