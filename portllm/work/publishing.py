"""Directories and files that appear whole or not at all."""

import os
import shutil
import socket
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from portllm.errors import ResolveError
from portllm.formats.tensors import PROVENANCE


@contextmanager
def published(out: Path, force: bool = False, inputs: Sequence[Path] = (), durable: bool = False) -> Iterator[Path]:
    """A private sibling of `out` that becomes `out` when the block ends, and vanishes when it raises.

    An existing `out` is refused before the block runs; with `force` it is replaced at its end, where it is a directory
    that this tool wrote and holds none of the `inputs`. What killed processes of this host left beside it is removed.
    `durable`: all of it is flushed to the disk before it becomes `out`, and then that it did.
    """
    _require_free(out, force, inputs)
    out.parent.mkdir(parents=True, exist_ok=True)
    _sweep(out)
    private = out.parent / _private_name(out)
    private.mkdir()
    try:
        yield private
        if durable:
            _flush(*private.rglob("*"), private)
        old = _moved_away(out, private) if force and out.exists() else None
        private.rename(out)
        if durable:
            _flush(out.parent)
        if old:
            shutil.rmtree(old)
    finally:
        shutil.rmtree(private, ignore_errors=True)


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A private sibling of `file` that takes its place when the block ends, and vanishes when it raises.

    Made before the block runs: raises ResolveError for a `file` that cannot be written, or is none (a device, a pipe).
    """
    if not file.parent.is_dir():
        raise ResolveError(f"{file}: there is no directory {file.parent}")
    if file.exists() and not file.is_file():
        raise ResolveError(f"{file}: is no regular file; name the file to write")
    target = file.resolve()
    private = target.with_name(_private_name(target))
    try:
        private.touch(exist_ok=False)
    except OSError as error:
        raise ResolveError(f"{file}: cannot be written: {error.strerror}") from None
    try:
        yield private
        private.replace(target)
    finally:
        private.unlink(missing_ok=True)


def _private_name(out: Path) -> str:
    return f".{out.name}.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}.partial"


def _require_free(out: Path, force: bool, inputs: Sequence[Path]) -> None:
    if not (out.is_symlink() or out.exists()):
        return
    if not force:
        raise ResolveError(f"{out}: exists already; --force replaces it")
    if held := next((path for path in inputs if path.resolve().is_relative_to(out.resolve())), None):
        raise ResolveError(f"{out}: --force would remove {held}, which is read: give another directory")
    if out.is_symlink() or not (out / PROVENANCE).is_file():
        raise ResolveError(f"{out}: is no directory that portllm wrote (it has no {PROVENANCE}), and --force replaces "
                           "nothing else: remove it yourself, or give another one")  # fmt: skip


def _sweep(out: Path) -> None:
    """Removes what dead processes left; a directory that one had moved out of the way goes back to its place."""
    mine = f".{out.name}.{socket.gethostname()}."
    for left in [path for path in out.parent.iterdir() if path.name.startswith(mine)]:
        pid, _, kind = left.name.removeprefix(mine).partition(".")
        if not pid.isdigit() or Path(f"/proc/{pid}").exists():
            continue
        if kind.endswith(".replaced") and not out.exists():
            left.rename(out)
        elif kind.endswith((".partial", ".replaced")):
            shutil.rmtree(left, ignore_errors=True)


def _moved_away(out: Path, private: Path) -> Path:
    """The first of two renames: a kill between them leaves the old one beside `out`, never a mixture."""
    old = private.with_suffix(".replaced")
    out.rename(old)
    return old


def _flush(*paths: Path) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
