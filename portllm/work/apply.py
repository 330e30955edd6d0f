"""θ + Σ λΔθ from files to files, in the memory of a few copies of the largest touched tensor.

Every name and shape is checked before the first byte is written. Then the kernel copies what no patch touches, while
the touched tensors are read, summed in fp32 in order, rounded once to the dtype they are stored in, and written. With
a `dtype` every floating tensor is rounded to that instead (a touched one from the fp32 sum, so still once). `apply`
writes into a directory of its own; `atomic_apply` publishes it by one rename. torch is imported when the first tensor
is made, while other threads copy.
"""

import functools
import json
import shutil
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portllm.errors import ResolveError, SpecError, StageError
from portllm.formats.tensors import (
    INDEX,
    ITEMSIZE,
    PROVENANCE,
    STORAGE,
    TensorEntry,
    encode_header,
    model_tensors,
    read_file,
    read_json,
    storage_dtype,
    weight_files,
)
from portllm.work.changes import Change, Patches, read_patches, touched
from portllm.work.context import Summary
from portllm.work.streaming import Copied, Made, Output, Piece, Progress, write_files

if TYPE_CHECKING:
    import torch

    from portllm.work.patches import Workspace

_SAFETENSORS: dict[str, str] = {torch_name: name for name, torch_name in STORAGE.items()}
_FLOATING = frozenset({*STORAGE, "F64"})
_COMPANIONS = frozenset({".json", ".txt", ".model", ".jinja", ".tiktoken"})
_OURS = frozenset({"config.json", PROVENANCE, "version.json"})
"""Files written anew, or true of the source only (and every index of shards)."""


@dataclass(frozen=True)
class Source:
    """A model directory and what the patches do to it, every target checked."""

    directory: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]
    changes: Mapping[str, list[Change]]
    """Touched tensor → (patch, module), in the order they are added."""

    @classmethod
    def read(cls, directory: Path, patches: Patches) -> "Source":
        """Raises `ResolveError` where the directory is no model, or a patch does not fit it."""
        tensors = model_tensors(directory)
        config = read_json(directory / "config.json")
        applied = read_patches(patches, tensors, ties_embeddings(config))
        if any(adapter.copies for adapter, _ in applied):
            from portllm.work.patches import require_same_copies

            require_same_copies(applied, tensors)
        return cls(directory, config, tensors, touched(applied, tensors))

    def tensor(self, name: str) -> "torch.Tensor":
        """The patched bits of one tensor, as it is stored."""
        from portllm.work.patches import DTYPES, add, read_tensor

        entry = self.tensors[name]
        return add(read_tensor(entry), self.changes.get(name, ()), DTYPES[entry.dtype])


def ties_embeddings(config: Mapping[str, Any]) -> bool:
    """Whether a config says that the head is the embedding."""
    return config.get("tie_word_embeddings") is True


def stored_as(entry: TensorEntry, dtype: str | None) -> str:
    """Safetensors' name of the dtype a tensor is written in."""
    return _SAFETENSORS[dtype] if dtype is not None and entry.dtype in _FLOATING else entry.dtype


@dataclass(frozen=True)
class How:
    """Where and how fast; nothing here moves a bit of the result."""

    threads: int = 1
    durable: bool = False
    """Flushed to the disk before it is published: a power cut leaves it whole, too."""
    progress: Progress = lambda count: None


def apply(model: Path, patches: Patches, out: Path, dtype: str | None = None, how: How = How()) -> Summary:
    """Writes `model` with the patches added, in order, as a complete model directory into `out`.

    `patches` holds (directory, λ); `out` must be empty or absent. Each touched tensor is round(W + Σ λΔW) to the bit;
    every other tensor keeps its bytes. Raises `ResolveError` before anything is written where something does not fit.
    """
    if dtype is not None and dtype not in _SAFETENSORS:
        raise SpecError(f"dtype: {dtype!r} is none of {', '.join(_SAFETENSORS)}")
    source = Source.read(model, patches)
    if out.exists() and any(out.iterdir()):
        raise ResolveError(f"{out}: is not empty; give a directory that does not exist yet")
    _require_room(source, out, dtype)
    out.mkdir(parents=True, exist_ok=True)
    _copy_companions(source, out)
    _write_config(source, out, dtype)
    files = weight_files(model)
    if files[0].name == INDEX:
        _write_index(source, out, dtype)
    with closing(_Maker(source, how.threads)) as make:
        shards = [file for file in files if file.name != INDEX]
        outputs = [Output(out / file.name, _pieces(source, file, dtype, make)) for file in shards]
        write_files(outputs, how.threads, how.durable, how.progress)
    return {
        "tensors": len(source.tensors),
        "touched": len(source.changes),
        "bytes": _bytes(source, dtype),
        "dtype": dtype or storage_dtype(source.tensors),
    }


def atomic_apply(
    model: Path, patches: Patches, out: Path, force: bool = False, dtype: str | None = None, how: How = How()
) -> Summary:
    """`apply` under a private name beside `out`, renamed when complete: a killed one leaves no half model there."""
    with published(out, force) as private:
        return apply(model, patches, private, dtype, how)


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


def _bytes(source: Source, dtype: str | None) -> int:
    """Bytes of all tensors as they will be written."""
    return sum(written_bytes(entry, dtype) for entry in source.tensors.values())


def _require_room(source: Source, out: Path, dtype: str | None) -> None:
    parent = next(path for path in (out, *out.absolute().parents) if path.exists())
    free, need = shutil.disk_usage(parent).free, _bytes(source, dtype)
    if free < need:
        raise StageError(f"{out}: needs {need / 1e9:.2f} GB and {parent} has {free / 1e9:.2f} GB free; make room first")


def _copy_companions(source: Source, out: Path) -> None:
    """Tokenizer, generation config, licence: the small files that make a model directory complete."""
    for file in sorted(source.directory.iterdir()):
        wanted = file.suffix in _COMPANIONS or file.name.startswith(("LICENSE", "NOTICE"))
        ours = file.name in _OURS or file.name.endswith(".index.json")
        if wanted and file.is_file() and not ours:
            shutil.copyfile(file, out / file.name)


def _write_config(source: Source, out: Path, dtype: str | None) -> None:
    if dtype is None:
        shutil.copyfile(source.directory / "config.json", out / "config.json")
    else:
        _write_json(out / "config.json", _with_dtype(source.config, dtype) | {"dtype": dtype})


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A config whose every dtype is `dtype`: transformers 5 says `dtype`, older ones `torch_dtype`, parts their own."""
    changed: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            changed[name] = _with_dtype(value, dtype)
        elif name != "torch_dtype":
            changed[name] = dtype if name == "dtype" else value
    return changed


def _write_index(source: Source, out: Path, dtype: str | None) -> None:
    if dtype is None:
        shutil.copyfile(source.directory / INDEX, out / INDEX)
        return
    index = read_json(source.directory / INDEX)
    metadata = index.get("metadata")
    total = {"total_size": _bytes(source, dtype)}
    _write_json(out / INDEX, index | {"metadata": metadata | total if isinstance(metadata, dict) else total})


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class _Maker:
    """(tensor's name, dtype to write) → its patched bytes. torch is imported, once, by the first thread that calls."""

    def __init__(self, source: Source, threads: int) -> None:
        self.source, self.threads = source, threads
        self.lock = threading.Lock()
        self.workspace: Workspace | None = None

    def __call__(self, name: str, dtype: str) -> memoryview:
        with self.lock:
            from portllm.work.patches import Workspace, patched

            self.workspace = self.workspace or Workspace(self.threads)
        return patched(self.source.tensors[name], self.source.changes.get(name, ()), dtype, self.workspace)

    def close(self) -> None:
        if self.workspace is not None:
            self.workspace.close()


def _pieces(source: Source, file: Path, dtype: str | None, make: _Maker) -> list[Piece]:
    """One shard: runs of bytes to copy, and tensors to make between them."""
    entries, metadata = read_file(file)
    if dtype is None:
        begin = min((entry.start for entry in entries.values()), default=file.stat().st_size)
        pieces: list[Piece] = [Copied(file, 0, begin)]
    else:
        entries = {name: entry for name, entry in entries.items() if source.tensors.get(name) == entry}
        # Wide elements first keeps every tensor aligned, as the reference implementation lays them out.
        entries = dict(sorted(entries.items(), key=lambda item: -ITEMSIZE[stored_as(item[1], dtype)]))
        layout = {name: (stored_as(entry, dtype), entry.shape) for name, entry in entries.items()}
        header = encode_header(layout, metadata)
        pieces = [Made(len(header), lambda: memoryview(header))]
    for name, entry in entries.items():
        to = stored_as(entry, dtype)
        if source.tensors.get(name) == entry and (name in source.changes or to != entry.dtype):
            pieces.append(Made(written_bytes(entry, dtype), functools.partial(make, name, to)))
        else:
            _copy(pieces, file, entry)
    return pieces


def _copy(pieces: list[Piece], file: Path, entry: TensorEntry) -> None:
    """Adds a tensor's bytes, to the run before it where they follow it."""
    before = pieces[-1]
    if isinstance(before, Copied) and before.start + before.length == entry.start:
        pieces[-1] = Copied(file, before.start, before.length + entry.nbytes)
    else:
        pieces.append(Copied(file, entry.start, entry.nbytes))


def written_bytes(entry: TensorEntry, dtype: str | None) -> int:
    """Bytes of a tensor as it is written."""
    return entry.nbytes // ITEMSIZE[entry.dtype] * ITEMSIZE[stored_as(entry, dtype)]
