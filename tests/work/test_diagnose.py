"""Foresight: every number is the dense one's, computed without making the dense matrix."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from portllm.errors import ResolveError
from portllm.formats.adapter import read_adapter, stored_name
from portllm.formats.tensors import model_tensors
from portllm.work.diagnose import diagnose
from portllm.work.patches import delta, read_tensor
from portllm.work.source import Source
from tests.work.checkpoints import save_adapter, save_model


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two versions of a model in bf16 and two patches of ranks 3 and 5."""
    root = tmp_path_factory.mktemp(request.param)
    for seed, name in enumerate(("base", "model")):
        save_model(root / name, request.param, torch.bfloat16, seed)
    for seed, (name, rank) in enumerate((("p", 3), ("q", 5))):
        save_adapter(root / name, root / "base", seed + 3, r=rank, use_rslora=seed == 1)
    return root


def dense(made: Path, patch: str, module: str) -> torch.Tensor:
    """ΔW_OI, float64."""
    adapter = read_adapter(made / patch)
    dW = delta(adapter, module).double()
    return dW.T if adapter.targets[module].transposed else dW


def read(model: Path) -> Source:
    return Source.read(model, [])


def weight(made: Path, version: str, module: str) -> torch.Tensor:
    tensors = model_tensors(made / version)
    W = read_tensor(tensors[stored_name(f"{module}.weight", tensors) or ""]).double()
    return W.T if read_adapter(made / "p").targets[module].transposed else W


def test_a_patch_by_itself(made: Path) -> None:
    found = diagnose(made / "p")
    squares = 0.0
    for module, numbers in found["modules"].items():
        sigma = torch.linalg.svdvals(dense(made, "p", module))[:3]
        share = sigma**2 / (sigma**2).sum()
        assert numbers["rank"] == 3 and numbers["frobenius"] == pytest.approx(float(sigma.norm()), rel=1e-5)
        assert numbers["spectral"] == pytest.approx(float(sigma[0]), rel=1e-5)
        assert numbers["energy"] == pytest.approx(share.tolist(), abs=1e-5)
        assert numbers["effective_rank"] == pytest.approx(float((-(share * share.log()).sum()).exp()), rel=1e-4)
        squares += numbers["frobenius"] ** 2
    assert found["total"]["frobenius"] == pytest.approx(squares**0.5)
    assert found["total"]["parameters"] == sum(t.numel() for t in _factors(made / "p"))


def _factors(patch: Path) -> list[torch.Tensor]:
    from safetensors.torch import load_file

    return list(load_file(patch / "adapter_model.safetensors").values())


def test_against_a_version_and_its_update(made: Path) -> None:
    found = diagnose(made / "p", read(made / "model"), read(made / "base"))
    for module, numbers in found["modules"].items():
        dW, W, W0 = dense(made, "p", module), weight(made, "model", module), weight(made, "base", module)
        moved = (W + dW).float().bfloat16().double() - W
        assert numbers["relative"] == pytest.approx(float(dW.norm() / W.norm()), rel=1e-5)
        assert numbers["lost"] == pytest.approx(float((moved - dW).norm() / dW.norm()), rel=1e-3)
        assert numbers["absorbed"] == pytest.approx(float((moved == 0).double().mean()), abs=0.01)
        u, _, v = torch.linalg.svd(dW)
        update = W - W0
        assert numbers["overlap_out"] == pytest.approx(
            float((u[:, :3].T @ update).norm() / update.norm()) ** 2, rel=1e-3
        )
        assert numbers["overlap_in"] == pytest.approx(float((update @ v[:3].T).norm() / update.norm()) ** 2, rel=1e-3)
    versions = [model_tensors(made / name) for name in ("model", "base")]
    flat = [torch.cat([read_tensor(t[n]).double().reshape(-1) for n in sorted(t)]) for t in versions]
    assert found["total"]["update"] == pytest.approx(float((flat[0] - flat[1]).norm() / flat[1].norm()), rel=1e-5)


def test_what_rounding_loses_is_told_of_the_output_s_dtype(made: Path) -> None:
    exact = diagnose(made / "p", read(made / "model"), dtype=torch.float32)["total"]
    rounded = diagnose(made / "p", read(made / "model"))["total"]
    assert exact["lost"] < 1e-5 < rounded["lost"] and exact["absorbed"] <= rounded["absorbed"]


def test_against_another_patch(made: Path) -> None:
    found = diagnose(made / "p", read(made / "model"), other=made / "q")
    for module, numbers in found["modules"].items():
        first, second = dense(made, "p", module), dense(made, "q", module)
        residual, W = second - first, weight(made, "model", module)
        got = numbers["residual"]
        assert got["frobenius"] == pytest.approx(float(residual.norm()), rel=1e-5)
        assert got["spectral"] == pytest.approx(float(torch.linalg.matrix_norm(residual, 2)), rel=1e-5)
        assert got["of_patch"] == pytest.approx(float(residual.norm() / first.norm()), rel=1e-5)
        assert got["of_patched"] == pytest.approx(float(residual.norm() / (W + first).norm()), rel=1e-5)
        assert len(got["angles_out"]) == len(got["angles_in"]) == 3
    same = diagnose(made / "p", other=made / "p")
    assert same["total"]["residual_of_patch"] == pytest.approx(0, abs=1e-6)
    assert max(max(m["residual"]["angles_out"]) for m in same["modules"].values()) < 0.01


def test_what_one_version_s_files_hold_beyond_the_other_s_does_not_count(made: Path, tmp_path: Path) -> None:
    expected = diagnose(made / "p", read(made / "model"), read(made / "base"))["total"]["update"]
    more = Path(shutil.copytree(made / "base", tmp_path / "more"))
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(load_file(more / "model.safetensors") | buffers, more / "model.safetensors", {"format": "pt"})
    for first, second in ((made / "model", more), (more, made / "base")):
        found = diagnose(made / "p", read(first), read(second))["total"]["update"]
        assert found == pytest.approx(expected if second == more else 0.0)


def test_what_does_not_fit_together_is_refused(made: Path, tmp_path: Path) -> None:
    target = "q_proj" if made.name.startswith("llama") else "c_fc"
    few = save_adapter(tmp_path / "few", made / "base", target_modules=[target])
    with pytest.raises(ResolveError, match="is a target of one of the two patches only"):
        diagnose(made / "p", other=few)
    wide = Path(shutil.copytree(made / "p", tmp_path / "wide"))
    factors = load_file(wide / "adapter_model.safetensors")
    factors = {name: torch.cat([t, t], dim=1) if "lora_A" in name else t for name, t in factors.items()}
    save_file(factors, wide / "adapter_model.safetensors")
    with pytest.raises(ResolveError, match="not patches of one model"):
        diagnose(made / "p", other=wide)
    save_model(tmp_path / "other", "mistral", torch.bfloat16)
    with pytest.raises(ResolveError, match="not versions of one model|trained on another"):
        diagnose(made / "p", read(tmp_path / "other"), read(made / "base"))


def test_what_is_more_than_deltas_is_not_diagnosed_as_if_it_were_not(made: Path, tmp_path: Path) -> None:
    name = "q_proj" if made.name.startswith("llama") else "c_fc"
    dora = save_adapter(tmp_path / "dora", made / "base", target_modules=[name], use_dora=True)
    with pytest.raises(ResolveError, match=r"\(DoRA\): a diagnosis is of deltas only"):
        diagnose(dora)
