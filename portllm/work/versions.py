"""What a version θₜ is: the only place that opens one.

θₜ = round_D(W + Σₛ ΔWₛ): the deltas are added onto the root in fp32, in order, and each tensor is rounded once to the
dtype it is stored in. Roles root, delta1, delta2, … of a stage's inputs name a version. `materialise` makes it a
complete model directory, once per node; `Versions` keeps the one a process works on in memory.
"""

import contextlib
import gc
import hashlib
import json
import os
import re
import shutil
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from filelock import FileLock

from portllm.errors import StageError
from portllm.formats.tensors import content_files, read_json, weight_files
from portllm.work.apply import apply
from portllm.work.patches import tensor_bytes
from portllm.work.publishing import published
from portllm.work.resident import Resident
from portllm.work.source import Source

IN_USE_S = 600
"""Seconds after its last opening in which a built version is not dropped."""
CLAIM = "version.json"
"""Written by an update beside its delta or model: the sha256 of the version it makes, and of those before it."""


def numbered(inputs: Mapping[str, Path], role: str) -> list[Path]:
    """The paths of roles role1, role2, … in order; a gap is an error."""
    found = {int(match[1]): path for name, path in inputs.items() if (match := re.fullmatch(rf"{role}(\d+)", name))}
    if sorted(found) != list(range(1, len(found) + 1)):
        raise StageError(f"inputs hold {role} {sorted(found)}: they must be numbered 1, 2, … without a gap")
    return [found[index] for index in sorted(found)]


def version_inputs(inputs: Mapping[str, Path]) -> tuple[Path, list[Path]]:
    """(root, deltas in order) of the version that a stage's inputs name."""
    if "root" not in inputs:
        raise StageError(f"inputs {sorted(inputs)} name no version: the role `root` is missing")
    return inputs["root"], numbered(inputs, "delta")


def version_digest(inputs: Mapping[str, Path]) -> str:
    """sha256 over (name, dtype, shape, bytes) of the version's tensors, sorted by name; nothing is written.

    The same for root + deltas and for the directory they materialise to.
    """
    root, deltas = version_inputs(inputs)
    source = Source.read(root, [(path, 1.0) for path in deltas])
    digest = hashlib.sha256()
    for name, entry in sorted(source.tensors.items()):
        digest.update(json.dumps([name, entry.dtype, list(entry.shape)]).encode() + b"\n")
        digest.update(tensor_bytes(source.tensor(name)))
    return digest.hexdigest()


def identify(inputs: Mapping[str, Path], scratch: Path) -> tuple[str, list[str]]:
    """(sha256 of a version, sha256 of each version before it, θ₀ first), as its updates recorded them.

    Of a model that no update made, the digest is computed once per node; nothing is known to come before it.
    """
    root, deltas = version_inputs(inputs)
    claim = (deltas[-1] if deltas else root) / CLAIM
    if claim.is_file() and "sha256" in (facts := read_json(claim)):
        return str(facts["sha256"]), [str(digest) for digest in facts.get("lineage", [])]
    kept = scratch / "digests" / _identity([root, *deltas])
    if not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        written = kept.with_suffix(f".{os.getpid()}")
        written.write_text(version_digest(inputs))
        written.rename(kept)
    return kept.read_text(), []


def materialise(root: Path, deltas: Sequence[Path], scratch: Path) -> Path:
    """A complete model directory of root + deltas: root itself without deltas, else built once below `scratch`.

    Processes of one node that ask at the same time build it once. Raises `StageError` where the bits differ from
    the sha256 that the last delta's update recorded.
    """
    if not deltas:
        return root
    path = scratch / "versions" / _identity([root, *deltas])
    if path.is_dir():
        os.utime(path)  # the least recently used ones are the first to go
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if not path.is_dir():
                _build(root, deltas, path)
    return path


def _build(root: Path, deltas: Sequence[Path], path: Path) -> None:
    for left in path.parent.glob(f".{path.name}.*"):  # by a build that was killed: the lock is ours now
        shutil.rmtree(left, ignore_errors=True)
    _make_room(path.parent, sum(file.stat().st_size for file in weight_files(root)))
    with published(path) as private:
        apply(root, [(delta, 1.0) for delta in deltas], private)
        _check(private, deltas[-1])


def _make_room(versions: Path, need: int) -> None:
    """Drops what can be built again, the least recently opened first, until the disk has `need` bytes free.

    What was opened a short while ago stays: a worker may be reading it.
    """
    built = [(path.stat().st_mtime, path) for path in versions.iterdir() if path.is_dir() and path.name[0] != "."]
    for opened, path in sorted(built):
        if shutil.disk_usage(versions).free >= need or time.time() - opened < IN_USE_S:
            return
        dropped = path.with_name(f".{path.name}.dropped")  # a half removed one must not look like a version
        with contextlib.suppress(OSError):
            path.rename(dropped)
            shutil.rmtree(dropped)


def _check(built: Path, last: Path) -> None:
    """The rebuilt bits are those the lineage was trained on; another processor may sum a product in another order."""
    claim = last / CLAIM
    expected = read_json(claim).get("sha256") if claim.is_file() else None
    if expected is None:
        return
    if (actual := version_digest({"root": built})) != expected:
        raise StageError(
            f"{last}: rebuilt on this machine the version has sha256 {actual[:12]}…, its update recorded "
            f"{str(expected)[:12]}…: root or deltas changed, or this processor sums in another order; "
            "run the update again here, or rebuild where it ran"
        )


def _identity(directories: Sequence[Path]) -> str:
    """Names a version by where its parts lie and by their files' sizes, times and inodes: no byte is read."""
    parts = [
        [str(path.resolve()), [[file.name, *_stamp(file)] for file in content_files(path)]] for path in directories
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _stamp(file: Path) -> tuple[int, int, int]:
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


class Versions:
    """The version this process holds in memory: a cache of one."""

    def __init__(self) -> None:
        self.loads = 0
        """How many times weights were really loaded."""
        self._key: tuple[str, ...] = ()
        self._resident: Resident | None = None

    def open(self, inputs: Mapping[str, Path], dtype: str, device: str, scratch: Path) -> Resident:
        """The version named by roles root, delta1, … as a model in `dtype` on `device`, loaded only if it is not yet.

        A model that its last user left changed (modules, weights) is loaded anew.
        """
        root, deltas = version_inputs(inputs)
        path = materialise(root, deltas, scratch)
        key = (str(path), _identity([path]), dtype, device)
        if self._resident is None or self._key != key or not self._resident.untouched():
            self.close()  # before loading: two models may not fit
            self._resident, self._key = Resident(path, dtype, device), key
            self.loads += 1
        self._resident.reset()
        return self._resident

    def close(self) -> None:
        """Lets the resident model go, and its memory with it."""
        held = None if self._resident is None else weakref.ref(self._resident.model)
        self._resident, self._key = None, ()
        if held is not None and held() is not None:  # only where modules refer to each other: a collection costs 0.2 s
            gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
