"""A version is bits: in a directory, in memory, under a patch, exported; and as before once the patch is off."""

import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from portllm.errors import ResolveError, StageError
from portllm.formats.tensors import content_digest
from portllm.study.recipes import Export
from portllm.work import versions as module
from portllm.work.apply import apply
from portllm.work.context import RunContext
from portllm.work.export import export
from portllm.work.resident import Resident
from portllm.work.versions import Versions, materialise, version_digest, version_inputs
from tests.work.checkpoints import BASIC, load, same_bits, save_adapter, save_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
IDS_BT = torch.arange(24).reshape(2, 12)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models in fp32 and bf16, and adapters d1, d2, p1, p2 for each architecture."""
    root = tmp_path_factory.mktemp("made")
    for name in BASIC:
        for dtype in ("float32", "bfloat16"):
            save_model(root / f"{name}-{dtype}", name, DTYPES[dtype])
        for seed, adapter in enumerate(("d1", "d2", "p1", "p2")):
            # Dropout must not act: a version under a patch is in eval mode.
            shape = {"r": 2 + seed, "use_rslora": seed % 2 == 1, "lora_dropout": 0.5}
            save_adapter(root / f"{name}-{adapter}", root / f"{name}-float32", seed, **shape)
    return root


def roles(made: Path, name: str = "llama", dtype: str = "bfloat16", deltas: int = 2) -> dict[str, Path]:
    return {"root": made / f"{name}-{dtype}"} | {f"delta{i + 1}": made / f"{name}-d{i + 1}" for i in range(deltas)}


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS_BT).logits


def tree(model: Any) -> list[Any]:
    """Everything a patch could leave behind in a model's modules."""
    return [
        (
            name,
            type(module),
            sorted(module.__dict__),
            list(module._modules),
            len(module._forward_hooks),
            module.training,
        )
        for name, module in model.named_modules()
    ] + [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]


# What names a version


def test_deltas_are_taken_in_the_order_of_their_numbers() -> None:
    inputs = {f"delta{i}": Path(str(i)) for i in (2, 10, 1, 3, 4, 5, 6, 7, 8, 9)} | {
        "root": Path("r"),
        "patch1": Path("p"),
    }
    assert version_inputs(inputs) == (Path("r"), [Path(str(i)) for i in range(1, 11)])


@pytest.mark.parametrize("inputs", [{}, {"delta1": "d"}, {"root": "r", "delta2": "d"}, {"root": "r", "delta0": "d"}])
def test_a_version_without_root_or_with_a_gap_is_refused(inputs: dict[str, Any]) -> None:
    with pytest.raises(StageError, match=r"root|gap"):
        version_inputs(inputs)


# Its bits in a directory


def test_a_version_without_deltas_is_its_root(made: Path, tmp_path: Path) -> None:
    assert materialise(made / "llama-float32", [], tmp_path) == made / "llama-float32"
    assert list(tmp_path.iterdir()) == []


def test_deltas_are_summed_in_fp32_and_rounded_once(made: Path, tmp_path: Path) -> None:
    root, deltas = version_inputs(roles(made))
    shutil.copytree(root, tmp_path / "wide")
    wide = {n: t.float() for n, t in load_file(root / "model.safetensors").items()}
    save_file(wide, tmp_path / "wide" / "model.safetensors")
    apply(tmp_path / "wide", [(delta, 1.0) for delta in deltas], tmp_path / "sum")
    expected = {n: t.bfloat16() for n, t in load_file(tmp_path / "sum" / "model.safetensors").items()}
    assert same_bits(load_file(materialise(root, deltas, tmp_path) / "model.safetensors"), expected)


def test_a_version_is_built_once(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, deltas = version_inputs(roles(made))
    path = materialise(root, deltas, tmp_path)
    monkeypatch.setattr("portllm.work.versions.apply", lambda *arguments: pytest.fail("built again"))
    assert materialise(root, deltas, tmp_path) == path


def test_processes_that_ask_at_once_build_it_once(made: Path, tmp_path: Path) -> None:
    root, deltas = version_inputs(roles(made))
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_build_and_log, args=(root, deltas, tmp_path)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert (tmp_path / "builds").read_text() == "built\n"


def _build_and_log(root: Path, deltas: list[Path], scratch: Path) -> None:
    from portllm.work import versions

    def logged(*arguments: Any) -> Any:
        with (scratch / "builds").open("a") as log:
            log.write("built\n")
        time.sleep(0.5)  # long enough for the others to ask meanwhile
        return apply(*arguments)

    versions.apply = logged
    assert (versions.materialise(root, deltas, scratch) / "model.safetensors").is_file()


def test_a_full_disk_drops_the_version_that_was_opened_longest_ago_and_none_in_use(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, deltas = version_inputs(roles(made))
    old, used = (materialise(root, deltas[:1], tmp_path), materialise(root, deltas[1:], tmp_path))
    for path in (old, used):
        os.utime(path, (0, 0))
    assert materialise(root, deltas[1:], tmp_path) == used
    free = iter([0, 0, 10**12])
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=next(free)))
    new = materialise(root, deltas, tmp_path)
    assert (old.exists(), used.is_dir(), new.is_dir()) == (False, True, True)


def test_a_version_that_is_half_removed_is_none(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, deltas = version_inputs(roles(made))
    old = materialise(root, deltas[:1], tmp_path)
    os.utime(old, (0, 0))
    free = iter([0, 10**12, 10**12, 10**12])
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=next(free)))

    def interrupted(path: Path, *arguments: Any, **named: Any) -> None:
        (path / "config.json").unlink()
        raise OSError

    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "rmtree", interrupted)
        module._make_room(old.parent, 1)
    assert not old.exists()
    assert (materialise(root, deltas[:1], tmp_path) / "config.json").is_file()


def test_what_a_killed_build_left_is_cleared(made: Path, tmp_path: Path) -> None:
    root, deltas = version_inputs(roles(made))
    path = materialise(root, deltas, tmp_path)
    path.rename(path.parent / f".{path.name}.0123.partial")
    assert materialise(root, deltas, tmp_path) == path
    assert [p.name for p in path.parent.iterdir() if p.suffix == ".partial"] == []


def test_other_content_under_the_same_path_is_another_version(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "llama-bfloat16", tmp_path / "root")
    shutil.copytree(made / "llama-d1", tmp_path / "d")
    first = materialise(tmp_path / "root", [tmp_path / "d"], tmp_path)
    shutil.copy(made / "llama-d2" / "adapter_model.safetensors", tmp_path / "d")
    shutil.copy(made / "llama-d2" / "adapter_config.json", tmp_path / "d")
    second = materialise(tmp_path / "root", [tmp_path / "d"], tmp_path)
    assert version_digest({"root": first}) != version_digest({"root": second})


@pytest.mark.parametrize("name", BASIC)
def test_a_version_has_one_digest_in_parts_and_materialised(made: Path, tmp_path: Path, name: str) -> None:
    inputs = roles(made, name)
    path = materialise(*version_inputs(inputs), tmp_path)
    assert version_digest(inputs) == version_digest({"root": path})
    assert version_digest(inputs) != version_digest(roles(made, name, deltas=1))


def test_a_digest_does_not_know_shards(made: Path, tmp_path: Path) -> None:
    load(made / "llama-bfloat16", torch.bfloat16).save_pretrained(tmp_path / "s", max_shard_size="20KB")
    assert version_digest({"root": tmp_path / "s"}) == version_digest({"root": made / "llama-bfloat16"})


def test_bits_that_differ_from_the_recorded_ones_are_an_error(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "llama-d1", tmp_path / "d")
    inputs = {"root": made / "llama-bfloat16", "delta1": tmp_path / "d"}
    (tmp_path / "d" / "version.json").write_text(json.dumps({"sha256": version_digest(inputs)}))
    materialise(*version_inputs(inputs), tmp_path / "good")
    (tmp_path / "d" / "version.json").write_text(json.dumps({"sha256": "0" * 64}))
    with pytest.raises(StageError, match="sha256"):
        materialise(*version_inputs(inputs), tmp_path / "bad")
    assert [p.suffix for p in (tmp_path / "bad" / "versions").iterdir()] in ([], [".lock"])


# Its bits in memory


def test_one_version_is_resident_and_loaded_once(made: Path, tmp_path: Path) -> None:
    versions = Versions()
    first = versions.open(roles(made), "float32", "cpu", tmp_path)
    assert versions.open(roles(made), "float32", "cpu", tmp_path) is first
    assert versions.loads == 1
    assert versions.open(roles(made, deltas=1), "float32", "cpu", tmp_path) is not first
    assert versions.loads == 2
    versions.close()
    versions.open(roles(made, deltas=1), "bfloat16", "cpu", tmp_path)
    assert versions.loads == 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_resident_is_the_versions_bits_in_the_dtype_of_evaluation(made: Path, tmp_path: Path, dtype: str) -> None:
    resident = Versions().open(roles(made), dtype, "cpu", tmp_path)
    assert resident.storage == torch.bfloat16
    assert not resident.model.training
    expected = load(materialise(*version_inputs(roles(made)), tmp_path), torch.bfloat16).to(DTYPES[dtype])
    assert same_bits(weights(resident.model), weights(expected))


def _train(model: Any) -> None:
    model.train().requires_grad_(True)
    model(IDS_BT, labels=IDS_BT).loss.backward()
    torch.optim.AdamW(model.parameters(), lr=1e-2).step()


def _write_in_place(model: Any) -> None:
    with torch.no_grad():
        model.get_parameter("model.norm.weight").mul_(2)


def _swap_module(model: Any) -> None:
    model.model.norm = torch.nn.Identity()


@pytest.mark.parametrize("damage", [_train, _write_in_place, _swap_module])
def test_a_model_its_last_user_changed_is_loaded_anew(
    made: Path, tmp_path: Path, damage: Callable[[Any], None]
) -> None:
    versions = Versions()
    before = logits(versions.open(roles(made), "float32", "cpu", tmp_path).model)
    damage(versions.open(roles(made), "float32", "cpu", tmp_path).model)
    again = versions.open(roles(made), "float32", "cpu", tmp_path)
    assert versions.loads == 2
    assert torch.equal(logits(again.model), before)


def test_training_mode_and_gradients_are_put_back_without_a_load(made: Path, tmp_path: Path) -> None:
    versions = Versions()
    model = versions.open(roles(made), "float32", "cpu", tmp_path).model
    before = tree(model)
    model.train()
    model(IDS_BT, labels=IDS_BT).loss.backward()
    model.requires_grad_(False)
    again = versions.open(roles(made), "float32", "cpu", tmp_path).model
    assert versions.loads == 1
    assert tree(again) == before
    assert all(p.grad is None for p in again.parameters())


@pytest.mark.parametrize("evaluated", DTYPES)
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", BASIC)
def test_evaluated_applied_and_exported_weights_are_the_same_bits(
    made: Path, tmp_path: Path, name: str, stored: str, evaluated: str
) -> None:
    inputs, patches = roles(made, name, stored), [(made / f"{name}-p1", 1.0), (made / f"{name}-p2", -0.5)]
    context = RunContext(scratch=tmp_path, versions=Versions(), log=lambda line: None)
    resident = context.open(inputs, evaluated)
    apply(resident.path, patches, tmp_path / "applied")
    more = {f"patch{i + 1}": path for i, (path, _) in enumerate(patches)} | {"tokenizer": tmp_path}
    export(Export(scales=(1.0, -0.5)), inputs | more, tmp_path / "exported", context)
    with resident.applied(patches) as model:
        merged = weights(model)
    for out in ("applied", "exported"):
        written = load(tmp_path / out, DTYPES[stored])
        assert same_bits(merged, weights(written.to(DTYPES[evaluated])))


@pytest.mark.parametrize("mode", ["merged", "adapter"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", BASIC)
def test_a_patch_taken_off_leaves_the_model_as_it_was(
    made: Path, tmp_path: Path, name: str, dtype: str, mode: Any
) -> None:
    resident = Resident(made / f"{name}-bfloat16", dtype)
    before, modules, output = weights(resident.model), tree(resident.model), logits(resident.model)
    for patches in ([(made / f"{name}-p1", 1.0)], [(made / f"{name}-p2", 0.5), (made / f"{name}-p1", 1.0)]):
        with resident.applied(patches, mode) as model:
            assert not torch.equal(logits(model), output)
            assert not model.training
        assert same_bits(weights(resident.model), before)
        assert tree(resident.model) == modules
        assert torch.equal(logits(resident.model), output)
        assert resident.untouched()


@pytest.mark.parametrize("mode", ["merged", "adapter"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_block_that_raises_restores_too_even_what_it_wrote_over(made: Path, mode: Any, error: Any) -> None:
    resident = Resident(made / "llama-float32", "float32")
    before, modules = weights(resident.model), tree(resident.model)

    def fail() -> None:
        with resident.applied([(made / "llama-p1", 1.0)], mode) as model:
            if mode == "merged":
                model.get_parameter("model.layers.0.self_attn.q_proj.weight").data.zero_()
            raise error

    with pytest.raises(error):
        fail()
    assert same_bits(weights(resident.model), before)
    assert tree(resident.model) == modules


def test_a_patch_that_breaks_off_halfway_restores(made: Path, tmp_path: Path) -> None:
    resident = Resident(made / "llama-float32", "float32")
    before = weights(resident.model)
    factors = load_file(shutil.copytree(made / "llama-p1", tmp_path / "p") / "adapter_model.safetensors")
    factors[max(factors)].fill_(torch.nan)
    save_file(factors, tmp_path / "p" / "adapter_model.safetensors")
    with pytest.raises(ResolveError, match="NaN"), resident.applied([(tmp_path / "p", 1.0)]):
        pass
    assert same_bits(weights(resident.model), before)
    assert resident.untouched()


def test_no_patch_is_the_version_itself(made: Path) -> None:
    resident = Resident(made / "llama-float32", "float32")
    output = logits(resident.model)
    for mode in ("merged", "adapter"):
        with resident.applied([], mode) as model:
            assert torch.equal(logits(model), output)


@pytest.mark.parametrize("name", BASIC)
def test_kept_apart_is_pefts_forward_pass(made: Path, name: str) -> None:
    resident = Resident(made / f"{name}-bfloat16", "bfloat16")
    expected = PeftModel.from_pretrained(load(made / f"{name}-bfloat16", torch.bfloat16), made / f"{name}-p1").eval()
    with resident.applied([(made / f"{name}-p1", 1.0)], "adapter") as model:
        assert torch.equal(logits(model), logits(expected))


def test_several_patches_kept_apart_score_as_their_scaled_sum(made: Path) -> None:
    resident = Resident(made / "llama-float32", "float32")
    patches = [(made / "llama-p1", 0.3), (made / "llama-p2", -0.7)]
    with resident.applied(patches, "merged") as model:
        merged = logits(model)
    with resident.applied(patches, "adapter") as model:
        torch.testing.assert_close(logits(model), merged, rtol=1e-3, atol=1e-4)


def test_a_patch_for_another_architecture_touches_nothing(made: Path) -> None:
    resident = Resident(made / "llama-float32", "float32")
    with (
        pytest.raises(ResolveError, match="another architecture"),
        resident.applied([(made / "llama-p1", 1.0), (made / "gpt2-p1", 1.0)]),
    ):
        pass
    assert resident.untouched()


def test_patches_do_not_nest(made: Path) -> None:
    resident = Resident(made / "llama-float32", "float32")
    with resident.applied([(made / "llama-p1", 1.0)]):
        with pytest.raises(StageError, match="already"), resident.applied([(made / "llama-p2", 1.0)]):
            pass
        assert not resident.untouched()
    assert resident.untouched()


def test_a_patch_that_hides_targets_from_peft_is_refused_kept_apart(made: Path, tmp_path: Path) -> None:
    config = shutil.copytree(made / "llama-p1", tmp_path / "p") / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"target_modules": ["q_proj"]}))
    resident = Resident(made / "llama-float32", "float32")
    with pytest.raises(ResolveError, match="target_modules"), resident.applied([(tmp_path / "p", 1.0)], "adapter"):
        pass
    assert resident.untouched()


def test_a_missing_weight_is_an_error_and_not_a_random_one(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "llama-float32", tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    with pytest.raises(StageError, match=r"model\.norm\.weight"):
        Resident(tmp_path / "m", "float32")


# Exported


def test_an_export_says_what_it_was_made_of(made: Path, tmp_path: Path) -> None:
    (tmp_path / "newer").mkdir()
    (tmp_path / "newer" / "tokenizer_config.json").write_text("{}")
    inputs = roles(made, deltas=1) | {"patch1": made / "llama-p1", "tokenizer": tmp_path / "newer"}
    context = RunContext(scratch=tmp_path, versions=Versions(), log=lambda line: None)
    summary = export(Export(scales=(0.5,), dtype="float16"), inputs, tmp_path / "out", context)
    origin = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert origin["sha256"] == summary["sha256"] == version_digest({"root": tmp_path / "out"})
    assert origin["recipe"] == {"scales": [0.5], "dtype": "float16"}
    assert [part["content"] for part in origin["deltas"]] == [content_digest(made / "llama-d1")]
    assert [(p["content"], p["scale"]) for p in origin["patches"]] == [(content_digest(made / "llama-p1"), 0.5)]
    assert load(tmp_path / "out", "auto").dtype == torch.float16
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == "{}"


def test_an_export_needs_a_scale_for_each_patch(made: Path, tmp_path: Path) -> None:
    context = RunContext(scratch=tmp_path, versions=Versions())
    with pytest.raises(StageError, match="2 scales and the inputs 0 patches"):
        export(Export(scales=(1.0, 1.0)), roles(made), tmp_path / "out", context)
