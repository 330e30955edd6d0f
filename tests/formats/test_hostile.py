"""Whatever lies in a model's or a patch's directory: reading it ends in an answer, or in one error a user can read."""

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from portllm.errors import PortllmError, ResolveError
from portllm.formats.adapter import CONFIG, check_fits, read_adapter
from portllm.formats.tensors import (
    ADAPTER,
    INDEX,
    ITEMSIZE,
    SINGLE,
    TensorEntry,
    encode_header,
    model_tensors,
    read_header,
    read_index,
)
from portllm.work.apply import atomic_apply
from tests.formats.test_adapter import DOWN, PLAIN, REFUSED, Q, factors, model, save
from tests.formats.test_tensors import entry, save_shards, write_raw


def fuzz(examples: int) -> settings:
    return settings(max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


WHOLE = encode_header({"a": ("F32", (2,)), "b": ("I8", (3, 1))}, {"k": "v"}) + bytes(11)
BEGIN = len(WHOLE) - 11
TEXT = st.text(st.characters(), max_size=6)  # any code point: lone surrogates, line ends, control characters
NUMBERS = st.integers() | st.floats() | st.sampled_from([2**31, 2**63, 2**64, -1, 10**400, 1e300])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in directory.rglob("*")}


@contextmanager
def answered(*files: Path) -> Iterator[None]:
    """The block returns, or raises one line naming one of the files or their directory, and leaves all as they were."""
    before, said = contents(files[0].parent), None
    try:
        yield
    except ResolveError as error:
        said = str(error)
    if said is not None:
        assert_readable(said)
        assert any(str(file) in said for file in (*files, files[0].parent))
    assert contents(files[0].parent) == before


def assert_readable(message: str) -> None:
    """One line that every terminal prints as it stands."""
    assert message.strip() and message.isprintable(), ascii(message)


def assert_tiled(entries: dict[str, TensorEntry], file: Path) -> None:
    """The tensors are the rest of the file, and each has as many bytes as its shape says."""
    ends = [file.stat().st_size - sum(e.nbytes for e in entries.values()), *(e.end for e in entries.values())]
    assert [e.start for e in entries.values()] == ends[:-1] and ends[-1] == file.stat().st_size
    assert all(int(np.prod(e.shape, dtype=object)) * ITEMSIZE[e.dtype] == e.nbytes for e in entries.values())


def assert_answered(file: Path) -> None:
    with answered(file):
        assert_tiled(read_header(file), file)


# The header of a safetensors file


@fuzz(60)
@given(content=st.binary(max_size=60), length=st.none() | st.integers(0, 60))
def test_random_bytes_are_one_readable_error(tmp_path: Path, content: bytes, length: int | None) -> None:
    (tmp_path / SINGLE).write_bytes((b"" if length is None else struct.pack("<Q", length)) + content)
    assert_answered(tmp_path / SINGLE)


def test_a_file_cut_at_any_byte_or_longer_by_one_is_refused(tmp_path: Path) -> None:
    for content in [WHOLE[:size] for size in range(len(WHOLE))] + [WHOLE + b"\0"]:
        (tmp_path / SINGLE).write_bytes(content)
        with pytest.raises(ResolveError):
            read_header(tmp_path / SINGLE)
        assert_answered(tmp_path / SINGLE)


def test_any_byte_of_a_header_flipped_gives_tensors_that_tile_the_file_or_one_readable_error(tmp_path: Path) -> None:
    for position in range(BEGIN):
        for mask in (0x01, 0x20, 0xFF):
            flipped = bytes([WHOLE[position] ^ mask])
            (tmp_path / SINGLE).write_bytes(WHOLE[:position] + flipped + WHOLE[position + 1 :])
            assert_answered(tmp_path / SINGLE)


@fuzz(60)
@given(header=JSON | st.dictionaries(TEXT, JSON, max_size=3))
def test_a_header_of_any_json_is_one_readable_error(tmp_path: Path, header: Any) -> None:
    assert_answered(write_raw(tmp_path / SINGLE, header, bytes(8)))


FIELDS = {
    "dtype": st.sampled_from(["F32", "U8", "BOOL", "F64"]) | JSON,
    "shape": st.lists(st.integers(-1, 4), max_size=3) | st.lists(NUMBERS, max_size=2) | JSON,
    "data_offsets": st.lists(st.integers(-1, 9), min_size=2, max_size=2) | st.lists(NUMBERS, max_size=3) | JSON,
}


@fuzz(60)
@given(header=st.dictionaries(TEXT, st.fixed_dictionaries(FIELDS), min_size=1, max_size=2), metadata=JSON)
def test_fields_of_any_type_and_offsets_that_lie_are_one_readable_error(
    tmp_path: Path, header: dict[str, Any], metadata: Any
) -> None:
    assert_answered(write_raw(tmp_path / SINGLE, header, bytes(8)))
    assert_answered(write_raw(tmp_path / SINGLE, header | {"__metadata__": metadata}, bytes(8)))


@fuzz(60)
@given(sizes=st.lists(st.integers(1, 3), min_size=1, max_size=4), moved=st.data(), by=st.sampled_from([-2, -1, 1, 2]))
def test_overlaps_and_holes_are_refused_in_whatever_order_the_tensors_stand(
    tmp_path: Path, sizes: list[int], moved: st.DataObject, by: int
) -> None:
    ends = np.cumsum([0, *sizes]).tolist()
    spans = moved.draw(st.permutations(list(pairwise(ends))))
    header = {f"t{a}": entry([b - a], a, b, "U8") for a, b in spans}
    assert_tiled(read_header(write_raw(tmp_path / SINGLE, header, bytes(ends[-1]))), tmp_path / SINGLE)
    a, b = spans[0]
    write_raw(tmp_path / SINGLE, header | {f"t{a}": entry([b - a], a + by, b + by, "U8")}, bytes(ends[-1]))
    with pytest.raises(ResolveError):
        read_header(tmp_path / SINGLE)
    assert_answered(tmp_path / SINGLE)


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F32","shape":[9],"shape":[2],"data_offsets":[0,8]}}',
        b'{"__metadata__":{"x":"1","x":"2"},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"\\u0061":{}}',
    ],
)
def test_a_duplicate_key_is_refused_wherever_it_stands(tmp_path: Path, header: bytes) -> None:
    with pytest.raises(ResolveError, match="twice"):
        read_header(write_raw(tmp_path / SINGLE, header, bytes(8)))


NUMERALS = ["9" * 4300, "9" * 5000, "-0", "1e999", "NaN", "Infinity", "1.0", "true", "1E2", "[]"]


@pytest.mark.parametrize("numeral", NUMERALS)
def test_numbers_no_file_can_have_are_one_readable_error(tmp_path: Path, numeral: str) -> None:
    for text in (
        f'{{"a":{{"dtype":"U8","shape":[{numeral}],"data_offsets":[0,{numeral}]}}}}',
        f'{{"a":{{"dtype":"F64","shape":[{numeral},{numeral},{numeral}],"data_offsets":[0,8]}}}}',
        f'{{"a":{{"dtype":"F64","shape":[0],"data_offsets":[{numeral},{numeral}]}}}}',
        f'{{"a":{{"dtype":{numeral},"shape":[],"data_offsets":[0,8]}}}}',
    ):
        assert_answered(write_raw(tmp_path / SINGLE, text.encode(), bytes(8)))


def test_a_shape_of_a_hundred_thousand_sizes_is_refused_without_multiplying_or_quoting_them(tmp_path: Path) -> None:
    with pytest.raises(ResolveError) as error:  # the product takes a second here, and days where a header is full
        read_header(write_raw(tmp_path / SINGLE, {"a": entry(shape=[9] * 100_000)}, bytes(8)))
    assert len(str(error.value)) < 1000


UNPRINTABLE = ["two\nlines", "\x1b[2Jscreen", "\0", "a\rb", "\u2028", "\x85", "\u202e"]


@pytest.mark.parametrize("name", UNPRINTABLE)
def test_a_tensor_name_cannot_break_the_line_it_is_named_on(tmp_path: Path, name: str) -> None:
    twice = json.dumps({name: 1})[:-1] + "," + json.dumps({name: 1})[1:]
    for header in (
        {name: 1}, twice.encode(), {name: entry(dtype="F33")}, {name: entry(shape=[-1])}, {name: entry(shape=[3])},
        {name: entry(shape=[1], start=4)}, {"b": entry(), name: entry()},
    ):  # fmt: skip
        with pytest.raises(ResolveError) as error:
            read_header(write_raw(tmp_path / SINGLE, header, bytes(8)))
        assert_readable(str(error.value))


NESTED = [900, 960, 990, 1000, 3000, 20_000, 100_000]


@pytest.mark.parametrize("depth", NESTED)
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_json_of_any_depth_is_one_readable_error(tmp_path: Path, depth: int, opening: str, closing: str) -> None:
    deep = opening * depth + "0" + closing * depth
    for header in (
        deep,
        f'{{"a":{{"dtype":{deep},"shape":{deep},"data_offsets":[0,8]}}}}',
        f'{{"__metadata__":{deep}}}',
    ):
        assert_answered(write_raw(tmp_path / SINGLE, header.encode(), bytes(8)))
    (tmp_path / SINGLE).unlink()
    for index in (deep, f'{{"weight_map":{deep}}}', f'{{"weight_map":{{"a":{deep}}}}}'):
        (tmp_path / INDEX).write_text(index)
        assert_index_answered(tmp_path)
    patch = save(tmp_path / "p")
    for field in (*PLAIN, *REFUSED, *MORE_FIELDS):
        (patch / CONFIG).write_text(json.dumps(PLAIN | {field: "HERE"}).replace('"HERE"', deep))
        assert_patch_answered(patch)


# The index of a model's shards


def assert_index_answered(directory: Path) -> None:
    """Whatever `model_tensors` says, too: an index that reads may still name files that are not there."""
    with answered(directory / INDEX):
        assert all("/" not in shard and shard.endswith(".safetensors") for shard in read_index(directory).values())
    with answered(directory / INDEX):
        model_tensors(directory)


@fuzz(60)
@given(index=JSON | st.fixed_dictionaries({"weight_map": JSON | st.dictionaries(TEXT, JSON | TEXT, max_size=2)}))
def test_an_index_of_any_json_is_one_readable_error(tmp_path: Path, index: Any) -> None:
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert_index_answered(tmp_path)


@fuzz(40)
@given(position=st.integers(0, 300), replacement=st.binary(min_size=1, max_size=4), cut=st.integers(0, 60))
def test_a_damaged_index_gives_its_tensors_or_one_readable_error(
    tmp_path: Path, position: int, replacement: bytes, cut: int
) -> None:
    shards = {"m-1.safetensors": {"a": np.zeros(3, "f4")}, "m-2.safetensors": {"b": np.zeros(1, "f4")}}
    whole = (save_shards(tmp_path / "m", shards) / INDEX).read_bytes()
    position %= len(whole)
    damaged = whole[:position] + replacement + whole[position + len(replacement) :]
    (tmp_path / "m" / INDEX).write_bytes(damaged[: len(damaged) - cut])
    assert_index_answered(tmp_path / "m")


OUTSIDE = [
    "../o.safetensors", "./m.safetensors", "/m.safetensors", "//m.safetensors", "m.safetensors/", "a/../m.safetensors",
    "..\\o.safetensors", "C:\\o.safetensors", "m.safetensors\0", "\0.safetensors", "m\0/../o.safetensors", "o.bin",
    ".", "...", "~/o.safetensors",
]  # fmt: skip


@pytest.mark.parametrize("shard", OUTSIDE)
def test_a_shard_is_a_plain_name_of_its_directory_even_where_the_file_exists(tmp_path: Path, shard: str) -> None:
    directory = tmp_path / "m"
    save_shards(directory, {"m.safetensors": {"a": np.zeros(3, "f4")}})
    shutil.copy(directory / "m.safetensors", tmp_path / "o.safetensors")
    (directory / INDEX).write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(ResolveError, match="no file of this directory"):
        read_index(directory)
    assert_index_answered(directory)


ABSENT = ["x" * 300, "x" * 5000, "\ud800", "\udcff", "\n", "\x1b[2J", "é", "."]


@pytest.mark.parametrize("stem", ABSENT)
@pytest.mark.parametrize("name", ["a", "\ud800", "a\nb"])
def test_a_shard_no_file_system_can_hold_is_one_readable_error(tmp_path: Path, stem: str, name: str) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {name: f"{stem}.safetensors"}}))
    with pytest.raises(ResolveError):
        model_tensors(tmp_path)
    assert_index_answered(tmp_path)


# Links: a hub cache's files are links to blobs elsewhere


def linked(directory: Path, elsewhere: Path) -> None:
    """Moves every file of a directory elsewhere, and leaves a link under its name."""
    elsewhere.mkdir()
    for number, file in enumerate(sorted(directory.iterdir())):
        file.rename(elsewhere / f"blob{number}")
        file.symlink_to(Path("..") / elsewhere.name / f"blob{number}")


def sharded(directory: Path) -> Path:
    """A model of two shards that `patch` fits."""
    q, down = np.ones((6, 10), "f4"), np.ones((10, 7), "f4")
    save_shards(directory, {"m-1.safetensors": {f"{Q}.weight": q}, "m-2.safetensors": {f"{DOWN}.weight": down}})
    (directory / "config.json").write_text("{}")
    return directory


def patch(directory: Path) -> Path:
    save(directory)
    save_file({name: np.ones_like(factor) for name, factor in factors(SHAPES).items()}, directory / ADAPTER)
    return directory


SHAPES = {Q: (6, 4, 10), DOWN: (10, 4, 7)}


def test_links_out_of_the_directory_load_as_the_files_they_lead_to(tmp_path: Path) -> None:
    source, added = sharded(tmp_path / "m"), patch(tmp_path / "p")
    atomic_apply(source, [(added, 1.0)], tmp_path / "plain")
    shapes = {name: e.shape for name, e in model_tensors(source).items()}
    linked(source, tmp_path / "blobs")
    linked(added, tmp_path / "more-blobs")
    blobs = contents(tmp_path / "blobs")
    assert {name: e.shape for name, e in model_tensors(source).items()} == shapes
    assert read_adapter(added).targets.keys() == SHAPES.keys()
    atomic_apply(source, [(added, 1.0)], tmp_path / "out")
    assert contents(tmp_path / "blobs") == blobs
    assert not any(file.is_symlink() for file in (tmp_path / "out").iterdir())
    written, expected = (
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir() if file.name != "provenance.json"}
        for name in ("out", "plain")
    )  # but for what says when
    assert written == expected


@pytest.mark.parametrize("target", ["nowhere", "m-1.safetensors", ".", "../m", "/dev/null", "/dev/zero"])
def test_a_shard_that_links_to_no_regular_file_is_missing(tmp_path: Path, target: str) -> None:
    shard = sharded(tmp_path / "m") / "m-1.safetensors"
    shard.unlink()
    shard.symlink_to(target)
    with pytest.raises(ResolveError, match=r"m-1.safetensors: the shard is missing"):
        model_tensors(tmp_path / "m")
    assert_answered_apply(tmp_path, tmp_path / "m", patch(tmp_path / "p"))


# An adapter


MORE_FIELDS = (
    "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "eva_config", "exclude_modules",
    "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_bias",
    "lora_dropout", "lora_ga_config", "megatron_core", "modules_to_save", "peft_version", "qalora_group_size",
    "revision", "task_type", "use_dora", "use_rslora", "fan_in_fan_out", "rank_pattern", "alpha_pattern",
)  # fmt: skip
PATTERNS = st.dictionaries(st.text("()[]{}?*+|\\.^$,ab019:P<>=!-", max_size=8), st.integers(1, 5) | JSON, max_size=2)


def assert_patch_answered(directory: Path) -> None:
    with answered(directory / CONFIG, directory / ADAPTER):
        adapter = read_adapter(directory)
        assert adapter.base is None or isinstance(adapter.base, str)
        for mismatch in check_fits(adapter, model()):
            assert_readable(mismatch.reason)


@fuzz(80)
@given(
    config=st.dictionaries(st.sampled_from([*PLAIN, *REFUSED, *MORE_FIELDS]) | TEXT, JSON, min_size=1, max_size=2),
    patterns=PATTERNS,
)
@example(config={}, patterns={"a{99999999999}": 4})
@example(config={}, patterns={"(" * 3000 + ")" * 3000: 4})
@example(config={}, patterns={"(?P<a>": 4})
@example(config={"base_model_name_or_path": 3}, patterns={})
def test_any_values_of_known_and_unknown_fields_give_an_adapter_or_one_readable_error(
    tmp_path: Path, config: dict[str, Any], patterns: dict[str, Any]
) -> None:
    patch = save(tmp_path / "p")
    for more in (config, {"rank_pattern": patterns}, {"alpha_pattern": patterns}):
        (patch / CONFIG).write_text(json.dumps(PLAIN | more))
        assert_patch_answered(patch)


@pytest.mark.parametrize("text", ["", "[]", "7", '"LORA"', "null", "{}", "{'r': 4}", "\ufeff{}", '{"r": NaN', "\0"])
def test_a_configuration_that_is_no_object_is_one_readable_error(tmp_path: Path, text: str) -> None:
    patch = save(tmp_path / "p")
    (patch / CONFIG).write_text(text)
    with pytest.raises(ResolveError):
        read_adapter(patch)
    assert_patch_answered(patch)


@pytest.mark.parametrize("value", [1, 1.0])
@pytest.mark.parametrize("field", ["fan_in_fan_out", "use_rslora", "use_dora", "lora_bias"])
def test_a_number_is_neither_true_nor_false(tmp_path: Path, field: str, value: float) -> None:
    with pytest.raises(ResolveError, match=f"`{field}` is 1.*neither true nor false"):
        read_adapter(save(tmp_path / "p", **{field: value}))


@pytest.mark.parametrize("name", UNPRINTABLE)
def test_a_module_name_cannot_break_the_line_it_is_named_on(tmp_path: Path, name: str) -> None:
    whole, half = factors({name: (3, 4, 3)}), {f"base_model.model.{name}.lora_A.weight": np.zeros((4, 3), "f4")}
    for arrays in (half, {name: np.zeros(1, "f4")}, factors({name: (3, 8, 3)}), whole):
        patch = save(tmp_path / "p")
        save_file(arrays, patch / ADAPTER)
        assert_patch_answered(patch)
        assert_answered_apply(tmp_path, sharded(tmp_path / "m"), patch)


# A patch, applied


def assert_answered_apply(directory: Path, source: Path, patch: Path) -> None:
    """The patch is applied to a model as complete as before, or nothing is left beside it."""
    out = directory / "outs" / "out"
    before = contents(source) | contents(patch)
    try:
        atomic_apply(source, [(patch, 1.0)], out)
    except PortllmError as error:
        assert_readable(str(error))
        assert list(out.parent.glob("*")) == []
    else:
        written = {name: (e.dtype, e.shape) for name, e in model_tensors(out).items()}
        assert written == {name: (e.dtype, e.shape) for name, e in model_tensors(source).items()}
        shutil.rmtree(out)
    assert contents(source) | contents(patch) == before


Mangle = Callable[[bytes], bytes]


@st.composite
def mangles(draw: st.DrawFn) -> Mangle:
    """Bytes replaced somewhere, anywhere or in the header, and the end cut off or something added."""
    position = draw(st.integers(0, 2000) | st.integers(8, 120))
    replacement, end, cut = (
        draw(st.binary(max_size=6)),
        draw(st.binary(max_size=2)),
        draw(st.sampled_from([0, 0, 1, 99])),
    )

    def mangle(whole: bytes) -> bytes:
        at = position % len(whole)
        return (whole[:at] + replacement + whole[at + len(replacement) :])[: len(whole) - cut] + end

    return mangle


@fuzz(60)
@given(mangle=mangles(), file=st.sampled_from([ADAPTER, ADAPTER, CONFIG]))
@example(mangle=lambda whole: b"", file=ADAPTER)
@example(mangle=lambda whole: whole[:-4] + b"\xff\xff\xff\x7f", file=ADAPTER)
def test_a_damaged_patch_is_applied_whole_or_not_at_all(tmp_path: Path, mangle: Mangle, file: str) -> None:
    source, damaged = sharded(tmp_path / "m"), patch(tmp_path / "p")
    (damaged / file).write_bytes(mangle((damaged / file).read_bytes()))
    assert_answered_apply(tmp_path, source, damaged)


LAYER = f"model.layers.{'9' * 5000}.x"
"""More digits than Python makes a number of."""
ENDS = (
    "lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector", "lora_embedding_A", "lora_embedding_B",
    "base_layer.weight", "base_layer.bias", "bias", "weight", "",
)  # fmt: skip
NAMES = st.builds(
    "{}{}.{}".format,
    st.sampled_from(["base_model.model.", "base_model.model.", "base_model.model", ""]),
    st.sampled_from([Q, DOWN, "", ".", "lm_head", LAYER, "model.layers.-1.x", "a\nb", "٣.٣."]),
    st.sampled_from(ENDS),
)
DIMENSIONS = st.sampled_from([(4, 10), (6, 4), (4, 7), (10, 4), (6,), (10,), (0,), (), (6, 10), (1, 1, 1)])
FLAGS = st.fixed_dictionaries(
    {},
    optional={
        "use_dora": st.just(True), "lora_bias": st.just(True), "fan_in_fan_out": st.booleans(),
        "bias": st.sampled_from(["all", "lora_only"]), "modules_to_save": st.just(["lm_head", "q_proj", "down_proj"]),
    },
)  # fmt: skip


@fuzz(80)
@given(
    layout=st.dictionaries(NAMES, st.tuples(st.sampled_from([*ITEMSIZE, "F32", "F32", "F32"]), DIMENSIONS), max_size=4),
    flags=FLAGS,
    beside=st.booleans(),
)
@example(
    layout={f"base_model.model.{LAYER}.lora_{half}.weight": ("F32", (4, 4)) for half in "AB"}, flags={}, beside=True
)
def test_tensors_of_any_name_shape_and_dtype_are_applied_whole_or_not_at_all(
    tmp_path: Path, layout: dict[str, tuple[str, tuple[int, ...]]], flags: dict[str, Any], beside: bool
) -> None:
    """`beside`: beside the factors of a patch that fits."""
    source, made = sharded(tmp_path / "m"), save(tmp_path / "p", **flags)
    plain = {name: ("F32", factor.shape) for name, factor in factors(SHAPES).items()} if beside else {}
    layout = plain | layout
    size = sum(int(np.prod(shape)) * ITEMSIZE[dtype] for dtype, shape in layout.values())
    (made / ADAPTER).write_bytes(encode_header(layout, {}) + bytes(size))
    assert_answered_apply(tmp_path, source, made)


@pytest.mark.parametrize("dtype", ["I64", "BOOL", "C64", "F64", "F8_E4M3"])
def test_what_takes_a_weights_place_is_stored_as_weights_are(tmp_path: Path, dtype: str) -> None:
    source, made = sharded(tmp_path / "m"), save(tmp_path / "p", modules_to_save=["q_proj"])
    header = encode_header({f"base_model.model.{Q}.weight": (dtype, (6, 10))}, {})
    (made / ADAPTER).write_bytes(header + bytes(60 * ITEMSIZE[dtype]))
    with pytest.raises(ResolveError, match=dtype):
        atomic_apply(source, [(made, 1.0)], tmp_path / "outs" / "out")


def test_a_damaged_model_is_patched_whole_or_not_at_all(tmp_path: Path) -> None:
    source, added = sharded(tmp_path / "m"), patch(tmp_path / "p")
    for file in ("m-1.safetensors", INDEX, "config.json"):
        whole = (source / file).read_bytes()
        for damaged in (b"", whole[:-1], whole + b"\0", whole[:9], b"[]", b"\xff" * 20):
            (source / file).write_bytes(damaged)
            assert_answered_apply(tmp_path, source, added)
        (source / file).write_bytes(whole)
    atomic_apply(source, [(added, 1.0)], tmp_path / "outs" / "out")
    assert (load_file(tmp_path / "outs" / "out" / "m-1.safetensors")[f"{Q}.weight"] == 9).all()
