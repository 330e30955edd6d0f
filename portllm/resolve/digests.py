"""Content digests of files, cached by (path, size, mtime, inode) so that a second plan reads nothing again."""

import hashlib
import json
import os
import uuid
from collections.abc import Iterable
from pathlib import Path


def cache_directory() -> Path:
    """`PORTLLM_CACHE`, or ~/.cache/portllm."""
    return Path(os.environ.get("PORTLLM_CACHE") or Path.home() / ".cache" / "portllm")


class DigestCache:
    """sha256 of files; one JSON file, written once at the end."""

    def __init__(self, directory: Path | None = None) -> None:
        self.path = (directory or cache_directory()) / "digests.json"
        self.known = _load(self.path)
        self.dirty = False

    def file(self, path: Path) -> str:
        """sha256 of a file's bytes."""
        signature = stat_signature(path)
        name = str(path.absolute())
        entry = self.known.get(name)
        if entry is None or entry[0] != signature:
            with path.open("rb") as file:
                entry = [signature, hashlib.file_digest(file, "sha256").hexdigest()]
            self.known[name] = entry
            self.dirty = True
        return str(entry[1])

    def files(self, paths: Iterable[Path], base: Path) -> str:
        """sha256 over names (relative to base) and contents of several files."""
        lines = sorted(f"{p.relative_to(base).as_posix()}:{self.file(p)}" for p in paths)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def save(self) -> None:
        """Keep what was computed; a cache that cannot be written is no error."""
        if not self.dirty:
            return
        write_cache(self.path, self.known)


def write_cache(path: Path, value: object) -> None:
    """Keep a JSON value for the next plan; a cache that cannot be written is no error."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:6]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(value))
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)


def stat_signature(path: Path) -> str:
    """Size, mtime and inode of a file, as text."""
    stat = path.stat()
    return f"{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ino}"


def _load(path: Path) -> dict[str, list[str]]:
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}
