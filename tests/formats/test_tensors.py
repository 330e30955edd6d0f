"""Safetensors headers are believed only once proven, and a directory's weights are found or refused by name."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from portllm.errors import ResolveError
from portllm.formats.tensors import (
    INDEX,
    content_digest,
    content_files,
    encode_header,
    model_tensors,
    read_file,
    read_header,
    storage_dtype,
)

quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write_raw(file: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return file


def entry(shape: Any = (2,), start: Any = 0, end: Any = 8, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def save_shards(directory: Path, shards: dict[str, dict[str, np.ndarray]]) -> Path:
    directory.mkdir(exist_ok=True)
    for shard, arrays in shards.items():
        save_file(arrays, directory / shard)
    weight_map = {name: shard for shard, arrays in shards.items() for name in arrays}
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


@quick
@given(st.dictionaries(st.text(min_size=1, max_size=8), st.lists(st.integers(0, 5), max_size=3), max_size=6))
def test_a_header_reads_as_the_reference_implementation_wrote_it(tmp_path: Path, shapes: dict[str, list[int]]) -> None:
    arrays = {name: np.random.default_rng(0).normal(size=shape).astype("f4") for name, shape in shapes.items()}
    arrays.pop("__metadata__", None)
    save_file(arrays, tmp_path / "x.safetensors", metadata={"format": "pt"})
    entries, metadata = read_file(tmp_path / "x.safetensors")
    content = (tmp_path / "x.safetensors").read_bytes()
    assert metadata == {"format": "pt"}
    assert {name: e.shape for name, e in entries.items()} == {name: a.shape for name, a in arrays.items()}
    assert all(content[e.start : e.end] == arrays[name].tobytes() for name, e in entries.items())


@quick
@given(st.dictionaries(st.text(min_size=1, max_size=8), st.lists(st.integers(0, 4), max_size=3), max_size=5))
def test_an_encoded_header_reads_back_in_both_implementations(tmp_path: Path, shapes: dict[str, list[int]]) -> None:
    shapes.pop("__metadata__", None)
    layout = {name: ("F32", tuple(shape)) for name, shape in shapes.items()}
    size = sum(4 * int(np.prod(shape)) for _, shape in layout.values())
    (tmp_path / "x.safetensors").write_bytes(encode_header(layout, {"a": "b"}) + bytes(size))
    assert {n: (e.dtype, e.shape) for n, e in read_header(tmp_path / "x.safetensors").items()} == layout
    assert {n: a.shape for n, a in load_file(tmp_path / "x.safetensors").items()} == {
        n: s for n, (_, s) in layout.items()
    }


HOSTILE = {
    "an empty file": (b"", "too few"),
    "a truncated length": (b"\x01\x00", "too few"),
    "a huge header": (struct.pack("<Q", 1 << 62) + b"{}", "over the limit"),
    "a truncated header": (struct.pack("<Q", 99) + b"{}", "truncated"),
    "no JSON": (struct.pack("<Q", 4) + b"spam", "not JSON"),
    "no UTF-8": (struct.pack("<Q", 4) + b'"\xff\xfe"', "not JSON"),
    "deep nesting": (struct.pack("<Q", 200_000) + b"[" * 200_000, "not JSON"),
    "a list": (struct.pack("<Q", 2) + b"[]", "not a JSON object"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_file_that_is_no_safetensors_is_one_clear_error(tmp_path: Path, case: str) -> None:
    content, message = HOSTILE[case]
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ResolveError, match=message) as error:
        read_header(tmp_path / "x.safetensors")
    assert "x.safetensors" in str(error.value)


LYING = {
    "offsets past the end": ({"a": entry(shape=[4], end=16)}, "end at byte"),
    "bytes nobody names": ({"a": entry(shape=[1], end=4)}, "end at byte"),
    "a hole": ({"a": entry(shape=[1], start=4)}, "hole after the header"),
    "an overlap": ({"a": entry(), "b": entry(start=4, end=8, shape=[1])}, "`b` overlaps `a`"),
    "a wrong product": ({"a": entry(shape=[3])}, "offsets span 8 bytes"),
    "a product that overflows 64 bits": ({"a": entry(shape=[1 << 62, 1 << 62])}, "offsets span"),
    "offsets backwards": ({"a": entry(start=8, end=0)}, "offsets span -8"),
    "a negative size": ({"a": entry(shape=[-1, -2])}, "natural numbers"),
    "a size that is true": ({"a": entry(shape=[True, 2])}, "natural numbers"),
    "a size that is a float": ({"a": entry(shape=[2.0])}, "natural numbers"),
    "three offsets": ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]}}, "natural numbers"),
    "an unknown dtype": ({"a": entry(dtype="F33")}, "F33"),
    "a dtype that is a list": ({"a": entry(dtype=["F32"])}, "does not know"),
    "a missing field": ({"a": {"dtype": "F32", "shape": [2]}}, "must hold dtype"),
    "an entry that is a string": ({"a": "F32"}, "must hold dtype"),
    "metadata of numbers": ({"a": entry(), "__metadata__": {"x": 1}}, "strings to strings"),
    "a duplicate key": (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":1}', "`a` twice"),
    "a lone surrogate": (b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', "not JSON"),
}


@pytest.mark.parametrize("case", LYING)
def test_a_header_that_lies_about_its_file_is_refused(tmp_path: Path, case: str) -> None:
    header, message = LYING[case]
    with pytest.raises(ResolveError, match=message):
        read_header(write_raw(tmp_path / "x.safetensors", header, bytes(8)))


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 140), replacement=st.binary(min_size=1, max_size=4), cut=st.integers(0, 30))
def test_any_damage_gives_either_a_proven_header_or_one_error(
    tmp_path: Path, position: int, replacement: bytes, cut: int
) -> None:
    whole = encode_header({"a": ("F32", (2,)), "b": ("I8", (3, 1))}, {"k": "v"}) + bytes(11)
    damaged = whole[:position] + replacement + whole[position + len(replacement) :]
    (tmp_path / "x.safetensors").write_bytes(damaged[: len(damaged) - cut])
    try:
        entries = read_header(tmp_path / "x.safetensors")
    except ResolveError:
        return
    assert sum(e.nbytes for e in entries.values()) <= len(damaged) - cut
    assert all(e.end <= len(damaged) - cut for e in entries.values())


def test_a_missing_file_is_a_resolve_error(tmp_path: Path) -> None:
    with pytest.raises(ResolveError, match="cannot be read"):
        read_header(tmp_path / "none.safetensors")


def test_shards_are_joined_by_their_index(tmp_path: Path) -> None:
    a, b = np.zeros(3, "f4"), np.ones((2, 2), "f2")
    save_shards(tmp_path, {"m-1.safetensors": {"a": a}, "m-2.safetensors": {"b": b}})
    tensors = model_tensors(tmp_path)
    assert {n: (e.file.name, e.dtype, e.shape) for n, e in tensors.items()} == {
        "a": ("m-1.safetensors", "F32", (3,)),
        "b": ("m-2.safetensors", "F16", (2, 2)),
    }


def test_a_missing_shard_and_a_missing_tensor_are_named(tmp_path: Path) -> None:
    save_shards(tmp_path, {"m-1.safetensors": {"a": np.zeros(3, "f4")}, "m-2.safetensors": {"b": np.zeros(1, "f4")}})
    save_file({"c": np.zeros(1, "f4")}, tmp_path / "m-2.safetensors")
    with pytest.raises(ResolveError, match=r"m-2.safetensors: holds no `b`"):
        model_tensors(tmp_path)
    (tmp_path / "m-2.safetensors").unlink()
    with pytest.raises(ResolveError, match=r"m-2.safetensors: the shard is missing"):
        model_tensors(tmp_path)


@pytest.mark.parametrize("shard", ["../m.safetensors", "/etc/m.safetensors", "a/b.safetensors", "..", "", "m.bin", 7])
def test_an_index_cannot_lead_out_of_its_directory(tmp_path: Path, shard: Any) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(ResolveError, match=INDEX):
        model_tensors(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "[" * 100_000])
def test_a_damaged_index_is_one_clear_error(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(ResolveError, match=INDEX):
        model_tensors(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pytorch_model.bin", "safetensors only"),
        ("consolidated.00.pth", "safetensors only"),
        ("adapter_model.safetensors", "PEFT adapter"),
        ("model.Q4.gguf", "GGUF"),
        ("config.json", "without weights"),
    ],
)
def test_a_directory_without_safetensors_weights_is_refused_with_the_mend(
    tmp_path: Path, name: str, message: str
) -> None:
    (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(ResolveError, match=message):
        model_tensors(tmp_path)


def test_a_model_and_an_adapter_in_one_directory_are_refused(tmp_path: Path) -> None:
    save_file({"a": np.zeros(1, "f4")}, tmp_path / "model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ResolveError, match="a model and an adapter"):
        model_tensors(tmp_path)


def test_a_directory_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResolveError, match="no such model directory"):
        model_tensors(tmp_path / "none")


def test_the_storage_dtype_is_the_one_most_bytes_are_in(tmp_path: Path) -> None:
    save_file({"big": np.zeros(9, "f2"), "small": np.zeros(4, "f4")}, tmp_path / "x.safetensors")
    assert storage_dtype(read_header(tmp_path / "x.safetensors")) == "float16"
    save_file({"q": np.zeros(99, "i1"), "scale": np.zeros(4, "f4")}, tmp_path / "x.safetensors")
    with pytest.raises(ResolveError, match="stored as I8"):
        storage_dtype(read_header(tmp_path / "x.safetensors"))


def model(directory: Path) -> Path:
    directory.mkdir()
    save_file({"a": np.arange(4, dtype="f4")}, directory / "model.safetensors")
    (directory / "config.json").write_text("{}")
    (directory / "tokenizer.json").write_text("{}")
    return directory


def test_a_digest_is_of_content_and_not_of_the_place(tmp_path: Path) -> None:
    first, second = model(tmp_path / "one"), model(tmp_path / "two")
    (second / "README.md").write_text("a model")
    assert content_digest(first) == content_digest(second)
    assert content_digest(first / "config.json") == content_digest(second / "tokenizer.json")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_digest_changes_with_every_byte_that_matters(tmp_path: Path, name: str) -> None:
    directory = model(tmp_path / "one")
    before = content_digest(directory)
    content = bytearray((directory / name).read_bytes())
    content[-1] ^= 1
    (directory / name).write_bytes(content)
    assert content_digest(directory) != before


def test_an_adapter_left_in_a_models_directory_does_not_stand_for_the_model(tmp_path: Path) -> None:
    first, second = model(tmp_path / "one"), model(tmp_path / "two")
    save_file({"a": np.ones(4, dtype="f4")}, second / "model.safetensors")
    for directory in (first, second):
        (directory / "adapter_model.safetensors").write_bytes(b"left")
    assert content_digest(first) == content_digest(model(tmp_path / "plain")) != content_digest(second)


def test_a_digest_takes_each_file_from_a_callers_memory(tmp_path: Path) -> None:
    directory, asked = model(tmp_path / "one"), []
    content_digest(directory, lambda file: asked.append(file.name) or "0" * 64)
    assert asked == [file.name for file in content_files(directory)] == [
        "config.json", "model.safetensors", "tokenizer.json"
    ]  # fmt: skip


def test_a_directory_with_nothing_that_matters_has_no_digest(tmp_path: Path) -> None:
    with pytest.raises(ResolveError, match="neither a model"):
        content_digest(tmp_path)
