"""Directories that appear whole or not at all."""

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from portllm.errors import ResolveError


@contextmanager
def published(out: Path, force: bool = False) -> Iterator[Path]:
    """A private sibling of `out` that becomes `out` when the block ends, and vanishes when it raises.

    An existing `out` is refused before the block runs, or replaced at its end with `force`.
    """
    if not force and (out.is_symlink() or out.exists()):
        raise ResolveError(f"{out}: exists already; --force replaces it")
    out.parent.mkdir(parents=True, exist_ok=True)
    private = out.parent / f".{out.name}.{uuid.uuid4().hex}.partial"
    private.mkdir()
    try:
        yield private
        if force and out.exists():
            _replace(private, out)
        else:
            private.rename(out)
    finally:
        shutil.rmtree(private, ignore_errors=True)


def _replace(private: Path, out: Path) -> None:
    """Two renames: a kill between them leaves the old model under the private name, never a mixture."""
    if out.is_symlink() or not out.is_dir():
        raise ResolveError(f"{out}: is no directory, and --force replaces directories only")
    old = private.with_suffix(".replaced")
    out.rename(old)
    private.rename(out)
    shutil.rmtree(old)
