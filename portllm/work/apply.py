"""θ + Σ λΔθ from files to files, shard by shard, in the memory of a few copies of the largest touched tensor.

Each shard's bytes are copied by the kernel; then only the touched tensors are read, summed in fp32 in order, rounded
once to the dtype they are stored in, and written in place. With a `dtype` every floating tensor is rounded to that
instead (a touched one from the fp32 sum, so still once). Names and shapes of every target are checked before the
first byte is written. `apply` writes into a directory of its own; `atomic_apply` publishes it by one rename.
"""

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from portllm.errors import ResolveError, StageError
from portllm.formats.tensors import (
    INDEX,
    STORAGE,
    TensorEntry,
    encode_header,
    model_tensors,
    read_file,
    read_json,
    storage_dtype,
    weight_files,
)
from portllm.work.context import Summary
from portllm.work.patches import DTYPES, Applied, Patches, add, read_patches, read_tensor, touched

_SAFETENSORS: dict[str, str] = {torch_name: name for name, torch_name in STORAGE.items()}
_FLOATING = frozenset({*STORAGE, "F64"})
_COMPANIONS = frozenset({".json", ".txt", ".model", ".jinja", ".tiktoken"})
_OURS = frozenset({"config.json", "provenance.json", "version.json"})
"""Files written anew, or true of the source only (and every index of shards)."""


@dataclass(frozen=True)
class Source:
    """A model directory and what the patches do to it, every target checked."""

    directory: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]
    changes: Mapping[str, list[tuple[Applied, str]]]
    """Touched tensor → (patch, module), in the order they are added."""

    @classmethod
    def read(cls, directory: Path, patches: Patches) -> "Source":
        """Raises `ResolveError` where the directory is no model, or a patch does not fit it."""
        tensors = model_tensors(directory)
        config = read_json(directory / "config.json")
        applied = read_patches(patches, tensors, ties_embeddings(config))
        return cls(directory, config, tensors, touched(applied, tensors))

    def tensor(self, name: str, dtype: str | None = None) -> torch.Tensor:
        """The patched bits of one tensor: as stored, or in `dtype` where that is given and the tensor is floating."""
        entry = self.tensors[name]
        to = DTYPES[stored_as(entry, dtype)]
        if changes := self.changes.get(name):
            return add(read_tensor(entry), changes, to)
        return read_tensor(entry).to(to)


def ties_embeddings(config: Mapping[str, Any]) -> bool:
    """Whether a config says that the head is the embedding."""
    return config.get("tie_word_embeddings") is True


def stored_as(entry: TensorEntry, dtype: str | None) -> str:
    """Safetensors' name of the dtype a tensor is written in."""
    return _SAFETENSORS[dtype] if dtype is not None and entry.dtype in _FLOATING else entry.dtype


def apply(model: Path, patches: Patches, out: Path, dtype: str | None = None) -> Summary:
    """Writes `model` with the patches added, in order, as a complete model directory into `out`.

    `patches` holds (directory, λ); `out` must be empty or absent. Each touched tensor is round(W + Σ λΔW) to the bit;
    every other tensor keeps its bytes. Raises `ResolveError` before anything is written where something does not fit.
    """
    source = Source.read(model, patches)
    if out.exists() and any(out.iterdir()):
        raise ResolveError(f"{out}: is not empty; give a directory that does not exist yet")
    _require_room(source, out, dtype)
    out.mkdir(parents=True, exist_ok=True)
    _copy_companions(source, out)
    _write_config(source, out, dtype)
    for file in weight_files(model):
        if file.name == INDEX:
            _write_index(source, out, dtype)
        elif dtype is None:
            _patch_copy(source, file, out / file.name)
        else:
            _convert(source, file, out / file.name, dtype)
    return {
        "tensors": len(source.tensors),
        "touched": len(source.changes),
        "bytes": _bytes(source, dtype),
        "dtype": dtype or storage_dtype(source.tensors),
    }


def atomic_apply(model: Path, patches: Patches, out: Path, force: bool = False, dtype: str | None = None) -> Summary:
    """`apply` under a private name beside `out`, renamed when complete: a killed one leaves no half model there."""
    with published(out, force) as private:
        return apply(model, patches, private, dtype)


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
    elements = ((entry.nbytes // DTYPES[entry.dtype].itemsize, entry) for entry in source.tensors.values())
    return sum(count * DTYPES[stored_as(entry, dtype)].itemsize for count, entry in elements)


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


def _patch_copy(source: Source, file: Path, copy: Path) -> None:
    """The shard's bytes, then the touched tensors written over their old places."""
    copy_bytes(file, copy)
    here = [name for name in source.changes if source.tensors[name].file == file]
    with copy.open("r+b", buffering=0) as stream:
        for name in sorted(here, key=lambda name: source.tensors[name].start):
            stream.seek(source.tensors[name].start)
            _write(stream, source.tensor(name))


def _convert(source: Source, file: Path, converted: Path, dtype: str) -> None:
    """The shard with every floating tensor in `dtype`, one tensor in memory at a time."""
    entries, metadata = read_file(file)
    entries = {name: entry for name, entry in entries.items() if source.tensors.get(name) == entry}
    layout = {name: (stored_as(entry, dtype), entry.shape) for name, entry in entries.items()}
    # Wide elements first keeps every tensor aligned, as the reference implementation lays them out.
    layout = dict(sorted(layout.items(), key=lambda item: -DTYPES[item[1][0]].itemsize))
    with converted.open("wb", buffering=0) as stream:
        stream.write(encode_header(layout, metadata))
        for name in layout:
            _write(stream, source.tensor(name, dtype))


def _write(stream: Any, tensor: torch.Tensor) -> None:
    """A tensor's bytes, however many writes that takes (one takes at most 2 GiB)."""
    left = tensor_bytes(tensor)
    while len(left):
        left = left[stream.write(left) :]


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a CPU tensor as safetensors stores them, without a copy where it is contiguous."""
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def copy_bytes(file: Path, copy: Path) -> None:
    """Copies a file inside the kernel (sharing blocks where the file system can), or through memory where it cannot."""
    with file.open("rb", buffering=0) as source, copy.open("xb", buffering=0) as target:
        try:
            while os.copy_file_range(source.fileno(), target.fileno(), 1 << 30):
                pass
        except OSError:  # across file systems of different kinds, or one without the call
            source.seek(0)
            target.seek(0)
            target.truncate()
            shutil.copyfileobj(source, target, 1 << 24)
