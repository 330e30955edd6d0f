"""Content-addressed store on a directory: an artifact exists entirely or not at all.

A step writes into a private attempt directory; `publish` writes the record (payload, files with sha256, summary) beside
the output, syncs it, and renames the directory to its key. The first rename wins; a loser discards its own. Status is
derived from what exists, never stored. Nothing here reads a pickle.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from portllm.errors import StoreError
from portllm.store.layout import StoreLayout

RECORD = "record.json"


class Store:
    """One root directory."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root).absolute()
        self.paths = StoreLayout(self.root)

    def create(self) -> "Store":
        """Make the root; raises StoreError where that cannot be."""
        try:
            (self.root / "artifacts").mkdir(parents=True, exist_ok=True)
            (self.root / "attempts").mkdir(exist_ok=True)
            (self.root / "logs").mkdir(exist_ok=True)
        except OSError as error:
            raise StoreError(f"store {self.root}: {error.strerror}: choose another directory with --store") from None
        return self

    # --- what is known

    def has(self, stage: str, key: str) -> bool:
        """Whether a step is published."""
        return (self.paths.artifact(stage, key) / RECORD).is_file()

    def published(self, stages: Iterable[str]) -> set[str]:
        """Keys of everything published, one directory listing a stage."""
        return {entry.name for stage in set(stages) for entry in _entries(self.paths.stage(stage))}

    def path(self, stage: str, key: str) -> Path:
        """Directory of a published step."""
        return self.paths.artifact(stage, key)

    def record(self, stage: str, key: str) -> dict[str, Any]:
        """Record of a published step; a record that does not parse is a StoreError that names it."""
        return read_json(self.path(stage, key) / RECORD)

    # --- attempts

    def new_attempt(self, key: str) -> Path:
        """A path for one execution, made by nobody yet; it names the process, so that what a dead one left is known."""
        return self.paths.attempt(key, f"{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}")

    def begin(self, attempt: Path) -> Path:
        """Make an attempt's private, empty directory."""
        try:
            attempt.mkdir(parents=True)
        except OSError as error:
            raise StoreError(f"{attempt}: {error.strerror}") from error
        return attempt

    def publish(self, attempt: Path, stage: str, key: str, record: Mapping[str, Any]) -> bool:
        """Make an attempt the step's published output. False if another attempt was first; ours is then discarded."""
        target = self.paths.artifact(stage, key)
        if self.has(stage, key) and not _damaged(target / RECORD):
            shutil.rmtree(attempt, ignore_errors=True)
            return False
        write_json(attempt / RECORD, {"key": key, **record, "files": file_table(attempt)}, sync=True)
        _seal(attempt)
        target.parent.mkdir(parents=True, exist_ok=True)
        if not self._placed(attempt, target, key):
            self.discard(attempt)
            return False
        _sync_directory(target.parent)
        return True

    def _placed(self, attempt: Path, target: Path, key: str) -> bool:
        """Whether the attempt took its place. What is whole there stays; what is damaged is moved out of the way."""
        for _ in range(2):
            try:
                os.rename(attempt, target)
                return True
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
            if not _damaged(target / RECORD):
                return False
            aside = self.new_attempt(key)
            with contextlib.suppress(FileNotFoundError):  # another moved it
                os.rename(target, aside)
                if not _damaged(aside / RECORD):  # another published between the look and the move
                    os.rename(aside, target)
                    return False
                self.discard(aside)
        return False

    def discard(self, attempt: Path) -> None:
        """Remove a private attempt."""
        _unseal(attempt)
        shutil.rmtree(attempt, ignore_errors=True)

    def recover(self) -> list[str]:
        """Remove attempts left by dead processes of this host, and artifacts whose record does not parse."""
        removed = []
        for stage in _entries(self.root / "artifacts"):
            for entry in _entries(Path(stage.path)):
                if _damaged(Path(entry.path) / RECORD):
                    self.discard(Path(entry.path))
                    removed.append(entry.name)
        for entry in _entries(self.root / "attempts"):
            if _abandoned(entry.name):
                self.discard(Path(entry.path))
        return removed

    # --- failures

    def fail(self, key: str, failure: Mapping[str, Any]) -> Path:
        """Keep a failed attempt as JSON."""
        directory = self.paths.failures(key)
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"{len(list(directory.iterdir())):04d}-{uuid.uuid4().hex[:6]}.json"
        write_json(path, {"key": key, "host": socket.gethostname(), "time": time.time(), **failure})
        return path

    def failures(self, key: str) -> list[dict[str, Any]]:
        """Failed attempts of a step, oldest first."""
        return [json.loads(p.read_bytes()) for p in sorted(self.paths.failures(key).glob("*.json")) if not _damaged(p)]


def _abandoned(attempt: str) -> bool:
    """Whether the process that made an attempt directory lived on this host and is gone."""
    _, _, rest = attempt.partition(".")
    host, pid, _ = rest.rsplit(".", 2) if rest.count(".") >= 2 else ("", "0", "")
    return host == socket.gethostname() and not Path(f"/proc/{pid}").exists()


def file_table(directory: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file below a directory, but the record."""
    files = sorted(p for p in directory.rglob("*") if p.is_file() and p.name != RECORD)
    return {p.relative_to(directory).as_posix(): {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in files}


def sha256(path: Path) -> str:
    """sha256 of a file, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a published step; StoreError names the file, and how it is made again."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise damaged(path, error) from None
    if not isinstance(value, dict):
        raise damaged(path, "no JSON object")
    return value


def damaged(path: Path, why: object) -> StoreError:
    """The error for a file of a published step that cannot be read."""
    return StoreError(f"{path}: is damaged ({why}): remove {path.parent}, and the next `portllm run` makes it again")


def write_json(path: Path, value: Any, sync: bool = False) -> None:
    """Write JSON so that the file is either the old one or the whole new one."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:6]}")
    try:
        with temporary.open("w") as file:
            json.dump(value, file, indent=1, allow_nan=False)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def verify(directory: Path, record: Mapping[str, Any]) -> list[str]:
    """Files of an artifact that differ from its record."""
    found = file_table(directory)
    expected = record.get("files")
    if not isinstance(expected, dict):
        raise damaged(directory / RECORD, "it names no files")
    names = sorted(set(found) | set(expected))
    return [name for name in names if found.get(name) != expected.get(name)]


def _entries(directory: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(directory) as entries:
            return [e for e in entries if e.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []


def _damaged(path: Path) -> bool:
    """Whether a JSON object is not there, or none; one that cannot be read right now may be whole."""
    try:
        return not isinstance(json.loads(path.read_bytes()), dict)
    except (FileNotFoundError, ValueError):
        return True
    except OSError:
        return False


def _seal(directory: Path) -> None:
    """Files of an artifact are read-only, so that no tool changes one by accident."""
    for path in directory.rglob("*"):
        if path.is_file():
            path.chmod(0o444)


def _unseal(directory: Path) -> None:
    for path in [directory, *directory.rglob("*")]:
        if path.is_dir():
            path.chmod(0o755)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
