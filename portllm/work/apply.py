"""θ + Σ λΔθ from files to files, in the memory of a few copies of the largest touched tensor.

Every name and shape is checked before the first byte is written. Then the kernel copies what no patch touches, while
the touched tensors are read, summed in fp32 in order, rounded once to the dtype they are stored in, and written. With
a `dtype` every floating tensor is rounded to that instead (a touched one from the fp32 sum, so still once). `apply`
writes into a directory of its own; `atomic_apply` publishes it by one rename. torch is imported when the first tensor
is made, while other threads copy.
"""

import functools
import shutil
import threading
from collections.abc import Mapping
from contextlib import closing
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
    read_file,
    read_json,
    storage_dtype,
    weight_files,
)
from portllm.work.changes import Patches
from portllm.work.context import Summary
from portllm.work.provenance import of_model, write_json
from portllm.work.publishing import published
from portllm.work.source import Source, Terms, head_name
from portllm.work.streaming import Copied, Made, Output, Piece, Progress, write_files

if TYPE_CHECKING:
    from portllm.work.patches import Workspace

_SAFETENSORS: dict[str, str] = {torch_name: name for name, torch_name in STORAGE.items()}
_FLOATING = frozenset({*STORAGE, "F64"})
_COMPANIONS = frozenset({".json", ".txt", ".model", ".jinja", ".tiktoken"})
_OURS = frozenset({"config.json", PROVENANCE, "version.json"})
"""Files written anew, or true of the source only (and every index of shards)."""


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


def apply(
    model: Path, patches: Patches, out: Path, dtype: str | None = None, how: How = How(), terms: Terms = Terms()
) -> Summary:
    """Writes `model` with the patches added, in order, as a complete model directory into `out`.

    `patches` holds (directory, λ); `out` must be empty or absent. Each touched tensor is round(W + Σ λΔW) to the bit;
    every other tensor keeps its bytes. Raises `ResolveError` before anything is written where something does not fit.
    """
    if dtype is not None and dtype not in _SAFETENSORS:
        raise SpecError(f"dtype: {dtype!r} is none of {', '.join(_SAFETENSORS)}")
    source = Source.read(model, patches, terms)
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
    model: Path,
    patches: Patches,
    out: Path,
    force: bool = False,
    dtype: str | None = None,
    how: How = How(),
    terms: Terms = Terms(),
) -> Summary:
    """`apply` under a private name beside `out`, renamed when complete: a killed one leaves no half model there.

    Beside the weights lies what they were made of (`provenance.json`).
    """
    with published(out, force, [model, *terms.deltas, *(path for path, _ in patches)], how.durable) as private:
        summary = apply(model, patches, private, dtype, how, terms)
        write_json(private / PROVENANCE, of_model(model, patches, dtype, terms))
        return summary


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
    if dtype is not None:
        write_json(out / "config.json", _with_dtype(source.config, dtype) | {"dtype": dtype})
    elif source.untied:
        write_json(out / "config.json", source.config)
    else:
        shutil.copyfile(source.directory / "config.json", out / "config.json")


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
    if dtype is None and not source.untied:
        shutil.copyfile(source.directory / INDEX, out / INDEX)
        return
    index = read_json(source.directory / INDEX)
    metadata = index.get("metadata")
    total = {"total_size": _bytes(source, dtype)}
    where = {"weight_map": {name: entry.file.name for name, entry in source.tensors.items()}}
    write_json(out / INDEX, index | where | {"metadata": metadata | total if isinstance(metadata, dict) else total})


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
        return patched(name, self.source.tensors[name], self.source.changes.get(name, ()), dtype, self.workspace)

    def close(self) -> None:
        if self.workspace is not None:
            self.workspace.close()


def _pieces(source: Source, file: Path, dtype: str | None, make: _Maker) -> list[Piece]:
    """One shard: runs of bytes to copy, and tensors to make between them."""
    entries, metadata = read_file(file)
    untied = source.untied and source.tensors[head_name(source.config)].file == file
    if dtype is None and not untied:
        begin = min((entry.start for entry in entries.values()), default=file.stat().st_size)
        pieces: list[Piece] = [Copied(file, 0, begin)]
    else:
        entries = {name: entry for name, entry in source.tensors.items() if entry.file == file}
        # Wide elements first keeps every tensor aligned, as the reference implementation lays them out.
        entries = dict(sorted(entries.items(), key=lambda item: (-ITEMSIZE[stored_as(item[1], dtype)], item[1].start)))
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
