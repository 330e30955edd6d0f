"""Applied from files to files: PEFT's bits where a patch touches, the source's bytes everywhere else, or nothing."""

import ctypes
import errno
import json
import os
import shutil
import signal
import socket
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from portllm.errors import ResolveError, StageError
from portllm.formats.tensors import ADAPTER, INDEX, model_tensors
from portllm.work import apply as module
from portllm.work import streaming
from portllm.work.apply import How, apply, atomic_apply
from portllm.work.publishing import published
from portllm.work.resident import Resident
from tests.toys import portllm
from tests.work.checkpoints import CONFIGS, bits, load, peft_merged, same_bits, save_adapter, save_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STORED = [(name, dtype) for name in CONFIGS for dtype in ("float32", "bfloat16")] + [("llama", "float16")]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every architecture in each stored dtype with a plain and a rank-stabilised patch, written once."""
    root = tmp_path_factory.mktemp("made")
    for name, dtype in STORED:
        save_model(root / f"{name}-{dtype}", name, DTYPES[dtype])
    for name in CONFIGS:
        save_adapter(root / f"{name}-plain", root / f"{name}-float32")
        patterns = {"rank_pattern": {r".*0.*proj": 2}, "alpha_pattern": {r"1\..*": 3}} if name != "gpt2" else {}
        save_adapter(root / f"{name}-rslora", root / f"{name}-float32", seed=2, r=6, use_rslora=True, **patterns)
    (root / "llama-float32" / "tokenizer.json").write_text("{}")
    (root / "llama-float32" / "provenance.json").write_text("{}")
    (root / "llama-float32" / "pytorch_model.bin").write_bytes(b"pickled")
    (root / "llama-float32" / "pytorch_model.bin.index.json").write_text("{}")
    return root


@pytest.mark.parametrize("kind", ["plain", "rslora"])
@pytest.mark.parametrize(("name", "dtype"), STORED)
def test_applied_weights_are_pefts_merge_to_the_bit(
    made: Path, tmp_path: Path, name: str, dtype: str, kind: str
) -> None:
    source, patch = made / f"{name}-{dtype}", made / f"{name}-{kind}"
    summary = apply(source, [(patch, 1.0)], tmp_path / "out")
    assert same_bits(load(tmp_path / "out", DTYPES[dtype]).state_dict(), peft_merged(source, patch, DTYPES[dtype]))
    assert summary["touched"] == len(load_file(patch / ADAPTER)) // 2
    assert summary["dtype"] == dtype


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_factors_stored_in_16_bits_are_pefts_merge_onto_fp32_to_the_bit(made: Path, tmp_path: Path, dtype: str) -> None:
    source, patch = made / "llama-float32", shutil.copytree(made / "llama-plain", tmp_path / "p")
    factors = load_file(patch / ADAPTER)
    save_file({name: factor.to(DTYPES[dtype]) for name, factor in factors.items()}, patch / ADAPTER)
    apply(source, [(patch, 1.0)], tmp_path / "out")
    merged = load(tmp_path / "out", torch.float32).state_dict()
    assert same_bits(merged, peft_merged(source, patch, torch.float32))
    assert not same_bits(merged, peft_merged(source, made / "llama-plain", torch.float32))


BEYOND: dict[str, tuple[str, dict[str, Any]]] = {
    "dora": ("llama", {"use_dora": True}),
    "dora of Conv1D": ("gpt2", {"use_dora": True, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "biases": ("gpt2", {"bias": "all", "target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "biases of targets": ("gpt2", {"bias": "lora_only", "target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "bias of B": ("gpt2", {"lora_bias": True, "target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "saved modules": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "input_layernorm"]}),
    "embeddings": ("llama", {"target_modules": ["embed_tokens", "lm_head", "v_proj"]}),
    "some layers": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", BEYOND)
def test_everything_else_a_lora_adapter_does_is_pefts_merge_within_four_units_in_the_last_place(
    made: Path, tmp_path: Path, kind: str, dtype: str
) -> None:
    name, config = BEYOND[kind]
    source = made / f"{name}-{dtype}"
    patch = save_adapter(tmp_path / "p", source, **config)
    apply(source, [(patch, 1.0)], tmp_path / "out")
    ours = load(tmp_path / "out", DTYPES[dtype]).state_dict()
    # PEFT rounds an embedding's factors to the model's dtype when it loads them: held against its fp32 sum, rounded.
    computed = torch.float32 if kind == "embeddings" else DTYPES[dtype]
    pefts = {n: t.to(DTYPES[dtype]) for n, t in peft_merged(source, patch, computed).items()}
    assert ours.keys() == pefts.keys()
    assert not same_bits(ours, load(source, DTYPES[dtype]).state_dict())
    for key, tensor in ours.items():
        unit = torch.finfo(tensor.dtype).eps * pefts[key].abs().float()
        assert ((tensor.float() - pefts[key].float()).abs() <= 4 * unit).all(), key
    with Resident(source, dtype).applied([(patch, 1.0)]) as resident:
        assert same_bits(resident.state_dict(), ours)


def test_what_is_no_sum_of_deltas_is_applied_alone_and_whole(made: Path, tmp_path: Path) -> None:
    source = made / "llama-float32"
    patch = save_adapter(tmp_path / "p", source, use_dora=True)
    for patches in ([(patch, 0.5)], [(patch, 1.0), (made / "llama-plain", 1.0)]):
        with pytest.raises(ResolveError, match=r"scales .* \(DoRA\): that is no sum of deltas; apply it alone"):
            apply(source, patches, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_embedding_saved_along_fits_its_own_version_only(made: Path, tmp_path: Path) -> None:
    source = made / "llama-float32"
    patch = save_adapter(tmp_path / "p", source, target_modules=["embed_tokens"])
    save_model(tmp_path / "other", "llama", torch.float32, seed=9)
    with pytest.raises(ResolveError, match=r"carries the `model\.embed_tokens\.weight` it was trained on"):
        apply(tmp_path / "other", [(patch, 1.0)], tmp_path / "out")


def test_untouched_tensors_and_the_header_keep_their_bytes(made: Path, tmp_path: Path) -> None:
    source = made / "mistral-bfloat16"
    patch = save_adapter(tmp_path / "p", source, target_modules=["q_proj"])
    apply(source, [(patch, 1.0)], tmp_path / "out")
    old, new = (directory / "model.safetensors" for directory in (source, tmp_path / "out"))
    entries = model_tensors(source)
    first = min(entry.start for entry in entries.values())
    assert old.read_bytes()[:first] == new.read_bytes()[:first]
    before, after = load_file(old), load_file(new)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)}


def test_several_patches_with_scales_are_one_fp32_sum(made: Path, tmp_path: Path) -> None:
    source, patches = made / "llama-bfloat16", [made / "llama-plain", made / "llama-rslora"]
    apply(source, list(zip(patches, (0.5, -1.25), strict=True)), tmp_path / "out")
    zeroed = load_file(source / "model.safetensors")
    (tmp_path / "zero").mkdir()
    save_file(
        {n: torch.zeros_like(t, dtype=torch.float32) for n, t in zeroed.items()},
        tmp_path / "zero" / "model.safetensors",
    )
    shutil.copy(source / "config.json", tmp_path / "zero")
    deltas = []
    for index, patch in enumerate(patches):  # onto zeros, a patch is its own delta
        apply(tmp_path / "zero", [(patch, 1.0)], tmp_path / f"d{index}")
        deltas.append(load_file(tmp_path / f"d{index}" / "model.safetensors"))
    expected = {n: (t.float() + deltas[0][n] * 0.5 + deltas[1][n] * -1.25).bfloat16() for n, t in zeroed.items()}
    assert same_bits(load_file(tmp_path / "out" / "model.safetensors"), expected)


def test_shards_and_their_index_stay_as_they_were(made: Path, tmp_path: Path) -> None:
    load(made / "llama-bfloat16", torch.bfloat16).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    apply(tmp_path / "sharded", [(made / "llama-plain", 1.0)], tmp_path / "out")
    apply(made / "llama-bfloat16", [(made / "llama-plain", 1.0)], tmp_path / "single")
    assert (tmp_path / "sharded" / INDEX).read_bytes() == (tmp_path / "out" / INDEX).read_bytes()
    assert same_bits(*(load(tmp_path / name, torch.bfloat16).state_dict() for name in ("out", "single")))


@pytest.mark.parametrize(("stored", "sharded"), [("float32", False), ("float32", True), ("bfloat16", False)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_another_dtype_rounds_the_sum_once_and_is_written_in_the_config(
    made: Path, tmp_path: Path, dtype: str, stored: str, sharded: bool
) -> None:
    source, to = made / f"llama-{stored}", DTYPES[dtype]
    if sharded:
        load(source, torch.float32).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
        source = tmp_path / "sharded"
    apply(source, [(made / "llama-plain", 1.0)], tmp_path / "out", dtype)
    expected = {n: t.to(to) for n, t in peft_merged(source, made / "llama-plain", torch.float32).items()}
    assert same_bits(load(tmp_path / "out", "auto").state_dict(), expected)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == dtype
    assert "torch_dtype" not in config
    if sharded:
        total = json.loads((tmp_path / "out" / INDEX).read_text())["metadata"]["total_size"]
        assert total == sum(entry.nbytes for entry in model_tensors(tmp_path / "out").values())


def test_no_patch_at_all_is_a_copy(made: Path, tmp_path: Path) -> None:
    apply(made / "gpt2-bfloat16", [], tmp_path / "out")
    files = [directory / "model.safetensors" for directory in (made / "gpt2-bfloat16", tmp_path / "out")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_integers_stay_integers_under_another_dtype(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    tensors = {"w": torch.randn(3, 3), "ids": torch.arange(5), "b": torch.tensor([True])}
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    (tmp_path / "m" / "config.json").write_text('{"torch_dtype": "float32", "text_config": {"dtype": "float32"}}')
    apply(tmp_path / "m", [], tmp_path / "out", "bfloat16")
    expected = tensors | {"w": tensors["w"].bfloat16()}
    assert same_bits(load_file(tmp_path / "out" / "model.safetensors"), expected)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {"text_config": {"dtype": "bfloat16"}, "dtype": "bfloat16"}


def test_the_output_is_a_complete_model_without_what_was_true_of_the_source_only(made: Path, tmp_path: Path) -> None:
    apply(made / "llama-float32", [(made / "llama-plain", 1.0)], tmp_path / "out")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}


def test_a_patch_for_another_architecture_writes_nothing(made: Path, tmp_path: Path) -> None:
    for patch in (made / "gpt2-plain", made / "llama-plain"):
        other = made / ("llama-float32" if patch.name.startswith("gpt2") else "gpt2-float32")
        with pytest.raises(ResolveError, match="trained on another architecture"):
            atomic_apply(other, [(patch, 1.0)], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_found_before_writing(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(StageError, match="GB free"):
        atomic_apply(made / "llama-float32", [(made / "llama-plain", 1.0)], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_replaced_only_by_force(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    atomic_apply(made / "llama-float32", [], out)
    (out / "mine.txt").write_text("keep")
    with pytest.raises(ResolveError, match="--force"):
        atomic_apply(made / "llama-float32", [(made / "llama-plain", 1.0)], out)
    with pytest.raises(ResolveError, match="not empty"):
        apply(made / "llama-float32", [], out)
    assert (out / "mine.txt").exists()
    atomic_apply(made / "llama-float32", [(made / "llama-plain", 1.0)], out, force=True)
    assert not (out / "mine.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_force_replaces_nothing_that_is_read_or_that_portllm_did_not_write(made: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    model = shutil.copytree(made / "llama-float32", tmp_path / "home" / "model")
    patch = shutil.copytree(made / "llama-plain", tmp_path / "patch")
    (tmp_path / "home" / "provenance.json").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.rglob("*"))
    for out in (tmp_path / "home", model):
        with pytest.raises(ResolveError, match="would remove .*model, which is read"):
            atomic_apply(model, [(patch, 1.0)], out, force=True)
    for out in (tmp_path / "link", model / "config.json", tmp_path):
        with pytest.raises(ResolveError, match="no directory that portllm wrote|which is read"):
            atomic_apply(made / "llama-float32", [(made / "llama-plain", 1.0)], out, force=True)
    with pytest.raises(ResolveError, match="which is read"):
        atomic_apply(model, [(patch, 1.0)], patch, force=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_killed_processes_left_is_removed_and_what_they_moved_away_comes_back(made: Path, tmp_path: Path) -> None:
    out, model, dead = tmp_path / "out", made / "llama-float32", f"{socket.gethostname()}.{2**22 + 1}"
    atomic_apply(model, [], out)
    out.rename(tmp_path / f".out.{dead}.1a.replaced")
    (tmp_path / f".out.{dead}.1a.partial").mkdir()
    (tmp_path / ".out.elsewhere.17.1a.partial").mkdir()
    (tmp_path / f".out.{socket.gethostname()}.{os.getpid()}.1a.partial").mkdir()
    with pytest.raises(ResolveError, match="damaged|overflows"):
        atomic_apply(model, [(made / "llama-plain", 1e39)], out, force=True)
    assert sorted(path.name for path in tmp_path.iterdir() if dead in path.name) == []
    assert (out / "model.safetensors").exists() and len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(("dtype", "scale"), [(None, 1e39), ("float16", 1e6)])
def test_a_sum_that_overflows_is_refused(made: Path, tmp_path: Path, dtype: str | None, scale: float) -> None:
    with pytest.raises(ResolveError, match=r"`model.layers.*weight`: holds NaN or infinity .* lower the scale"):
        atomic_apply(made / "llama-float32", [(made / "llama-plain", scale)], tmp_path / "out", dtype=dtype)
    assert list(tmp_path.iterdir()) == []


def test_a_block_that_raises_publishes_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with published(tmp_path / "out") as private:
            (private / "half").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_killed_apply_leaves_the_whole_output_or_none(made: Path, tmp_path: Path) -> None:
    source, patch, out = made / "llama-float32", made / "llama-plain", tmp_path / "out"
    apply(source, [(patch, 1.0)], tmp_path / "expected")
    whole = load_file(tmp_path / "expected" / "model.safetensors")
    for kill in range(30):
        child = os.fork()  # no start of an interpreter: a kill lands anywhere in an apply
        if child == 0:
            try:
                while True:
                    atomic_apply(source, [(patch, 1.0)], out, force=True)
            finally:
                os._exit(1)
        time.sleep(0.003 * kill)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if out.exists():
            assert same_bits(load_file(out / "model.safetensors"), whole)
    assert out.exists() or list(tmp_path.glob(".out.*"))


def test_a_copy_falls_back_to_memory_where_the_kernel_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: int) -> int:
        raise OSError(18, "Invalid cross-device link")

    content = os.urandom(100_000)
    (tmp_path / "a").write_bytes(content)
    monkeypatch.setattr(streaming, "COPY", 1000)
    whole = [streaming.Copied(tmp_path / "a", 0, 100_000)]
    streaming.write_files([streaming.Output(tmp_path / "b", whole)], 2, durable=True)
    monkeypatch.setattr(streaming.os, "copy_file_range", refuse)
    streaming.write_files([streaming.Output(tmp_path / "c", whole)], 2, durable=False)
    assert (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes() == content


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_move_no_bit_and_progress_counts_every_byte(made: Path, tmp_path: Path, threads: int) -> None:
    counted: list[int] = []
    patches = [(made / "llama-plain", 1.0), (made / "llama-rslora", 0.5)]
    apply(made / "llama-bfloat16", patches, tmp_path / "one")
    how = How(threads, durable=True, progress=counted.append)
    apply(made / "llama-bfloat16", patches, tmp_path / "out", how=how)
    files = [tmp_path / name / "model.safetensors" for name in ("one", "out")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert sum(counted) == files[0].stat().st_size


def test_an_error_in_one_thread_stops_all_and_is_raised(tmp_path: Path) -> None:
    def fail() -> memoryview:
        raise ResolveError("damaged")

    (tmp_path / "short").write_bytes(b"x")
    pieces = [streaming.Made(1, fail), *[streaming.Made(1, lambda: memoryview(b"y"))] * 50]
    with pytest.raises(ResolveError, match="damaged"):
        streaming.write_files([streaming.Output(tmp_path / "a", pieces)], 2, durable=False)
    with pytest.raises(OSError, match="became shorter"):
        streaming.write_files(
            [streaming.Output(tmp_path / "b", [streaming.Copied(tmp_path / "short", 0, 9)])], 1, durable=False
        )


def test_a_scalar_is_cast_as_any_tensor_and_what_a_dtype_cannot_hold_is_refused(made: Path, tmp_path: Path) -> None:
    source = shutil.copytree(made / "llama-float32", tmp_path / "m")
    tensors = load_file(source / "model.safetensors")
    odd = {"model.bias": torch.tensor(-torch.inf), "model.scalar": torch.tensor(-1e4), "model.none": torch.zeros(0, 4)}
    save_file(tensors | odd, source / "model.safetensors", {"format": "pt"})
    apply(source, [(made / "llama-plain", 1.0)], tmp_path / "out", dtype="bfloat16")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[name], tensor.bfloat16()) for name, tensor in odd.items())
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"] + 1e5}, source / "model.safetensors")
    with pytest.raises(ResolveError, match=r"`model\.norm\.weight`: holds values that float16 cannot: .*keep float32"):
        atomic_apply(source, [(made / "llama-plain", 1.0)], tmp_path / "half", dtype="float16")
    assert not (tmp_path / "half").exists()


@pytest.mark.parametrize("force", [False, True])
def test_durable_is_all_of_a_directory_its_place_and_nothing_else(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    patches, out = [(made / "llama-plain", 1.0)], tmp_path / "out"
    if force:
        atomic_apply(made / "llama-float32", patches, out)
    flushed, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (flushed.append(Path(os.readlink(f"/proc/self/fd/{fd}"))), fsync(fd)))
    atomic_apply(made / "llama-float32", patches, out, force=force, how=How(2, durable=True))
    *inside, private, parent = flushed
    assert parent == tmp_path and private.parent == tmp_path and private.name.endswith(".partial")
    assert sorted(path.name for path in inside) == sorted(path.name for path in out.iterdir())
    assert {path.parent for path in inside} == {private} and len(inside) > 3


def test_minus_zero_survives(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    save_file({"w": torch.tensor([-0.0, 0.0])}, tmp_path / "m" / "model.safetensors")
    (tmp_path / "m" / "config.json").write_text("{}")
    apply(tmp_path / "m", [], tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")["w"]
    assert torch.equal(bits(written), bits(torch.tensor([-0.0, 0.0])))


def test_the_command_applies_patches_with_their_scales_and_says_what_it_wrote(made: Path, tmp_path: Path) -> None:
    source, out = made / "llama-bfloat16", tmp_path / "out"
    patches = [made / "llama-plain", made / "llama-rslora"]
    given = [f"--patch={patch}" for patch in patches] + ["--scale=1", "--scale=0.5"]
    said = portllm("apply", "--model", source, *given, "--out", out, "--durable", "--json")
    assert json.loads(said)[0]["touched"] == len(load_file(patches[0] / "adapter_model.safetensors")) // 2
    apply(source, list(zip(patches, (1.0, 0.5), strict=True)), tmp_path / "expected")
    files = [directory / "model.safetensors" for directory in (out, tmp_path / "expected")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scale=1", "--scale=2"], "--scale: 2 for 1 patches"),
        (["--scale=nan"], "no finite number"),
        (["--dtype=int8"], "dtype: 'int8' is none of"),
        (["--patch=nowhere"], "no such patch directory"),
        (["--model=nowhere"], "no such model directory"),
    ],
)
def test_a_wrong_request_is_one_error_and_writes_nothing(
    made: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    given = ["--model", made / "llama-float32", "--patch", made / "llama-plain", "--out", tmp_path / "out"]
    error = portllm("apply", *given, *arguments, code=2)
    assert message in error and error.count("error:") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_allocation_gets_files_of_full_size_all_the_same(tmp_path, monkeypatch):
    def missing(*_):
        ctypes.set_errno(errno.EOPNOTSUPP)
        return -1

    monkeypatch.setattr(streaming, "_libc", SimpleNamespace(fallocate=missing))
    with (tmp_path / "file").open("wb") as file:
        streaming._allocate(file.fileno(), 12345)
    assert (tmp_path / "file").stat().st_size == 12345


def test_a_full_disk_is_known_before_the_first_piece(tmp_path):
    with (tmp_path / "file").open("wb") as file, pytest.raises(OSError, match="No space left|File too large"):
        streaming._allocate(file.fileno(), 2**60)
