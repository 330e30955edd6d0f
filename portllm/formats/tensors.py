"""Safetensors on disk: headers read without trusting them, a model directory's tensors, what a directory's content is.

A file is 8 bytes (N, little endian), N bytes of JSON, then the tensors' bytes without holes. `read_header` proves all
of it against the file's size before anybody reads a tensor; `model_tensors` joins a directory's shards. Standard
library only: plans read headers, and a plan imports no torch.
"""

import hashlib
import json
import math
import reprlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from portllm.errors import ResolveError
from portllm.study.recipes import Dtype

ITEMSIZE: Mapping[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
"""Bytes of one element, by safetensors' name of the dtype."""
STORAGE: Mapping[str, Dtype] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""The dtypes a version's weights may be stored in: safetensors' name to torch's."""
HEADER_LIMIT = 100_000_000
"""Bytes of JSON: the reference implementation's own limit."""
_DIMENSIONS, _SIZE = 64, 1 << 63
"""Torch's own limits: a product of more factors takes days, and Python prints no number of over 4300 digits."""
SINGLE, INDEX, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"
PROVENANCE = "provenance.json"
"""Beside weights that this tool wrote: what made them."""
ADAPTER_CONFIG = "adapter_config.json"
CONFIGS = ("config.json", "generation_config.json", ADAPTER_CONFIG)
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: bytes [start, end) of `file`."""

    file: Path
    dtype: str
    """Safetensors' name: F32, BF16, …"""
    shape: tuple[int, ...]
    start: int
    """Offset in the file (header included)."""
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


def read_header(file: Path) -> dict[str, TensorEntry]:
    """A safetensors file's tensors, in the order of their bytes. `ResolveError` on anything the format forbids."""
    return read_file(file)[0]


def read_file(file: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """The tensors of a safetensors file, and its metadata."""
    raw, begin, size = _raw_header(file)
    header = _parse(file, raw)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ResolveError(f"{file}: `__metadata__` of the header must map strings to strings; the file is damaged")
    entries = {name: _entry(file, name, fields, begin) for name, fields in header.items()}
    return _in_order(file, entries, begin, size), metadata


def _raw_header(file: Path) -> tuple[bytes, int, int]:
    """The header's JSON, the offset of the first tensor byte, and the file's size."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(prefix := stream.read(8), "little")
            if len(prefix) < 8:
                raise ResolveError(f"{file}: {size} bytes are too few for a safetensors file; fetch it again")
            if length > HEADER_LIMIT:
                raise ResolveError(f"{file}: its header claims {length} bytes, over the limit of {HEADER_LIMIT}")
            if length > size - 8:
                raise ResolveError(f"{file}: its header claims {length} bytes, the file has {size}; it is truncated")
            raw = stream.read(length)
    except OSError as error:
        raise ResolveError(f"{file}: cannot be read: {error.strerror or error}") from error
    return raw, 8 + length, size


def _parse(file: Path, raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_distinct)
        json.dumps(header, ensure_ascii=False).encode()  # a lone surrogate is JSON, but no text
    except _TwiceError as error:
        raise ResolveError(f"{file}: the header holds {error}; the file is damaged") from None
    except (ValueError, RecursionError) as error:
        raise ResolveError(f"{file}: the header is not JSON ({error}); the file is damaged") from error
    if not isinstance(header, dict):
        raise ResolveError(f"{file}: the header is not a JSON object; the file is damaged")
    return header


def _entry(file: Path, name: str, fields: object, begin: int) -> TensorEntry:
    """One header entry, its own fields checked against each other."""
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise ResolveError(f"{file}: `{name}` must hold dtype, shape and data_offsets; the file is damaged")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEMSIZE:
        raise ResolveError(f"{file}: `{name}` has dtype {dtype!r}, which this version does not know")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        found = f"shape {reprlib.repr(shape)} at {reprlib.repr(offsets)}"
        raise ResolveError(f"{file}: `{name}` has {found}: not lists of natural numbers")
    start, end = offsets
    if end - start != math.prod(shape) * ITEMSIZE[dtype]:
        raise ResolveError(f"{file}: `{name}` is {dtype} {shape}, but its offsets span {end - start} bytes")
    return TensorEntry(file, dtype, tuple(shape), begin + start, begin + end)


def _naturals(value: object) -> bool:
    """A list of non-negative integers (JSON's true is an int to Python)."""
    return (
        isinstance(value, list)
        and len(value) <= _DIMENSIONS
        and all(type(item) is int and 0 <= item < _SIZE for item in value)
    )


def _in_order(file: Path, entries: dict[str, TensorEntry], begin: int, size: int) -> dict[str, TensorEntry]:
    """The entries by offset: they must tile the rest of the file, without hole, overlap or excess."""
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)))
    position, before = begin, "the header"
    for name, entry in ordered.items():
        if entry.start != position:
            kind = "overlaps" if entry.start < position else "leaves a hole after"
            raise ResolveError(f"{file}: `{name}` {kind} {before}; the file is damaged")
        position, before = entry.end, f"`{name}`"
    if position != size:
        raise ResolveError(f"{file}: its tensors end at byte {position}, the file at {size}; fetch it again")
    return ordered


def model_tensors(directory: Path) -> dict[str, TensorEntry]:
    """Every tensor of a model directory, one file or shards with an index, by name."""
    files = weight_files(directory)
    if files[0].name != INDEX:
        return read_header(files[0])
    return _joined(directory, read_index(directory))


def read_index(directory: Path) -> dict[str, str]:
    """The shard of each tensor, from `model.safetensors.index.json`; shards are plain names of this directory."""
    index = read_json(directory / INDEX)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ResolveError(f"{directory / INDEX}: `weight_map` must map tensor names to file names")
    for name, shard in weight_map.items():
        if shard != Path(shard).name or "\\" in shard or "\0" in shard or not shard.endswith(".safetensors"):
            raise ResolveError(f"{directory / INDEX}: `{name}` lies in {shard!r}, which is no file of this directory")
    return weight_map


def _joined(directory: Path, weight_map: Mapping[str, str]) -> dict[str, TensorEntry]:
    headers = {shard: read_header(directory / shard) for shard in sorted(set(weight_map.values()))}
    for name, shard in weight_map.items():
        if name not in headers[shard]:
            raise ResolveError(f"{directory / shard}: holds no `{name}`, though {INDEX} says so; fetch both again")
    return {name: headers[shard][name] for name, shard in sorted(weight_map.items())}


def weight_files(directory: Path) -> list[Path]:
    """The files that hold a model's weights, the index first; refuses what holds none or needs unpickling.

    `model.safetensors` wins over an index beside it, as it does in transformers.
    """
    if not directory.is_dir():
        raise ResolveError(f"{directory}: no such model directory")
    if (directory / ADAPTER_CONFIG).is_file() and any((directory / name).is_file() for name in (SINGLE, INDEX)):
        # transformers would load the adapter on top of the model, without a word
        raise ResolveError(f"{directory}: holds a model and an adapter; move the adapter to a directory of its own")
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    if (directory / INDEX).is_file():
        shards = sorted(set(read_index(directory).values()))
        if not shards:
            raise ResolveError(f"{directory / INDEX}: names no tensors")
        for shard in shards:
            if not _is_file(directory / shard):
                raise ResolveError(f"{directory / shard}: the shard is missing, though {INDEX} names it")
        return [directory / INDEX, *(directory / shard for shard in shards)]
    raise ResolveError(_why_no_weights(directory))


def _is_file(path: Path) -> bool:
    """`Path.is_file`, which raises where a name is longer than the file system's."""
    try:
        return path.is_file()
    except OSError:
        return False


def _why_no_weights(directory: Path) -> str:
    if (directory / ADAPTER).is_file():
        return f"{directory}: is a PEFT adapter, not a model; name it as a patch"
    if pickles := sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern)):
        return (
            f"{directory}: holds {pickles[0]}; safetensors only, since unpickling runs code: convert with "
            "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OUT) where you trust the file"
        )
    if any(directory.glob("*.gguf")):
        return f"{directory}: holds GGUF; name the .gguf file itself as the model's source"
    return f"{directory}: a model directory without weights (neither {SINGLE} nor {INDEX})"


class _TwiceError(ValueError):
    """A name that stands twice in a JSON object has no one meaning."""


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _TwiceError(f"`{Counter(name for name, _ in pairs).most_common(1)[0][0]}` twice")
    return found


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_distinct)
    except OSError as error:
        raise ResolveError(f"{file}: cannot be read: {error.strerror or error}") from error
    except _TwiceError as error:
        raise ResolveError(f"{file}: holds {error}; it is damaged") from None
    except (ValueError, RecursionError) as error:
        raise ResolveError(f"{file}: is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ResolveError(f"{file}: must hold a JSON object")
    return value


def storage_dtype(tensors: Mapping[str, TensorEntry]) -> Dtype:
    """The storage dtype D, as torch names it: the one most bytes are in. `ResolveError` for quantised weights."""
    bytes_of: Counter[str] = Counter()
    for entry in tensors.values():
        bytes_of[entry.dtype] += entry.nbytes
    dtype = bytes_of.most_common(1)[0][0] if bytes_of else "nothing"
    if dtype not in STORAGE:
        raise ResolveError(f"most weights are stored as {dtype}; a version is one of {', '.join(STORAGE.values())}")
    return STORAGE[dtype]


def sha256(file: Path) -> str:
    """Hexadecimal sha256 of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def content_files(directory: Path) -> list[Path]:
    """What of a model, tokenizer or adapter directory can change a number: weights, configs, tokenizer; by name."""
    adapter = [directory / name for name in (ADAPTER, ADAPTER_CONFIG)]  # without the second it is a model's leftover
    weights = adapter[:1] if all(file.is_file() for file in adapter) else _weights_if_any(directory)
    others = [directory / name for name in (*CONFIGS, *TOKENIZER_FILES) if (directory / name).is_file()]
    if not weights and not others:
        raise ResolveError(f"{directory}: holds neither a model, nor a tokenizer, nor an adapter")
    return sorted([*weights, *others], key=lambda path: path.name)


def _weights_if_any(directory: Path) -> list[Path]:
    """A tokenizer's directory has no weights; one with pickled weights only is still refused."""
    if (directory / "config.json").is_file() or (directory / INDEX).is_file() or not directory.is_dir():
        return weight_files(directory)
    return [directory / SINGLE] if (directory / SINGLE).is_file() else []


def content_digest(path: Path, digest: Callable[[Path], str] = sha256) -> str:
    """What a path holds, whatever it is called: a file's sha256; of a directory, sha256 over names and digests.

    `digest` gives one file's sha256; a caller that remembers digests hands in its own.
    """
    if path.is_file():
        return digest(path)
    lines = (f"{digest(file)}  {file.name}\n" for file in content_files(path))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def encode_header(entries: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON for tensors (dtype, shape) laid out in the order given; the tensors' bytes follow at once."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name, (dtype, shape) in entries.items():
        end = start + math.prod(shape) * ITEMSIZE[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors start aligned, as the reference implementation writes them
    return len(text).to_bytes(8, "little") + text
