"""SIGTERM to a process that trains: the training keeps its state first. Any other process ends at once."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

_told = threading.Event()
_training = threading.Event()


def told() -> bool:
    """Whether this process was told to end."""
    return _told.is_set()


def listen() -> None:
    """Takes SIGTERM over, in the main thread. A second one ends the process as the first would have."""
    before: Any = signal.getsignal(signal.SIGTERM)

    def heard(number: int, frame: Any) -> None:
        if _training.is_set() and not _told.is_set():
            _told.set()
        elif callable(before):
            before(number, frame)
        else:
            raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, heard)


@contextlib.contextmanager
def training() -> Iterator[None]:
    """While it lasts, `told` is asked after every optimizer step."""
    _training.set()
    try:
        yield
    finally:
        _training.clear()
