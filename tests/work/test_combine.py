"""Patch algebra: sums are exact, blends are those of the papers as PEFT computes them, a cut states its error."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import peft.utils.merge_utils as pefts
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from portllm.cli import main
from portllm.errors import ResolveError, SpecError
from portllm.formats.adapter import read_adapter
from portllm.work.apply import How, apply
from portllm.work.blending import blend_deltas
from portllm.work.changes import Blend
from portllm.work.combine import combine
from portllm.work.provenance import altered
from portllm.work.source import Terms
from tests.work.checkpoints import load, peft_merged, save_adapter, save_model


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and three patches: of rank 3, of rank 5 rank-stabilised, and of rank 2 on some modules only."""
    root = tmp_path_factory.mktemp(request.param)
    save_model(root / "model", request.param)
    conv = {"fan_in_fan_out": True} if request.param == "gpt2" else {}
    some = ["c_attn"] if conv else ["q_proj"]
    save_adapter(root / "a", root / "model", 3, r=3, **conv)
    save_adapter(root / "b", root / "model", 4, r=5, use_rslora=True, **conv)
    save_adapter(root / "c", root / "model", 5, r=2, target_modules=some, **conv)
    return root


def merged(model: Path, patch: Path, out: Path) -> dict[str, torch.Tensor]:
    apply(model, [(patch, 1.0)], out)
    return load_file(out / "model.safetensors")


def close(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], within: float = 1e-5) -> bool:
    return all(torch.allclose(first[name], second[name], rtol=0, atol=within) for name in first)


def test_a_sum_is_one_patch_whose_ranks_add_up_and_peft_loads_it(made: Path, tmp_path: Path) -> None:
    patches = [(made / "a", 1.0), (made / "b", -0.5), (made / "c", 2.0)]
    summary = combine(patches, tmp_path / "sum")
    assert (summary["error"], summary["rank"]) == (0.0, 10)
    ranks = {t.rank for t in read_adapter(tmp_path / "sum").targets.values()}
    assert ranks == {8, 10}
    apply(made / "model", patches, tmp_path / "direct")
    direct = load_file(tmp_path / "direct" / "model.safetensors")
    assert close(merged(made / "model", tmp_path / "sum", tmp_path / "out"), direct)
    ours = load(tmp_path / "out", torch.float32).state_dict()
    assert close(peft_merged(made / "model", tmp_path / "sum", torch.float32), ours)


def test_a_patch_minus_itself_is_nothing(made: Path, tmp_path: Path) -> None:
    assert combine([(made / "a", 1.0), (made / "a", -1.0)], tmp_path / "none")["norm"] < 1e-6


@pytest.mark.parametrize("method", [None, "ties", "dare", "dare-ties"])
def test_a_cut_states_the_error_it_makes(made: Path, tmp_path: Path, method: Any) -> None:
    patches, blend = [(made / "a", 1.0), (made / "b", 1.0)], Blend(method, 0.5) if method else None
    summary = combine(patches, tmp_path / "cut", blend, rank=2)
    apply(made / "model", patches, tmp_path / "direct", terms=Terms(blend=blend))
    cut = merged(made / "model", tmp_path / "cut", tmp_path / "out")
    direct, before = (load_file(tmp_path / "direct" / "model.safetensors"), load_file(made / "model/model.safetensors"))
    error = sum(float((cut[name] - direct[name]).norm()) ** 2 for name in cut) ** 0.5
    norm = sum(float((direct[name] - before[name]).norm()) ** 2 for name in cut) ** 0.5
    assert summary["rank"] == 2
    assert 0 < summary["error"] < 1
    assert summary["error"] == pytest.approx(error / norm, rel=1e-3)


def test_at_full_rank_a_blend_loses_nothing(made: Path, tmp_path: Path) -> None:
    patches, blend = [(made / "a", 1.0), (made / "b", 1.0)], Blend("ties", 0.3)
    assert combine(patches, tmp_path / "full", blend, rank=10**6)["error"] < 1e-5
    apply(made / "model", patches, tmp_path / "direct", terms=Terms(blend=blend))
    direct = load_file(tmp_path / "direct" / "model.safetensors")
    assert close(merged(made / "model", tmp_path / "full", tmp_path / "out"), direct)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(2, 40), st.integers(1, 4), st.floats(0.1, 1), st.integers(0, 99))
def test_ties_is_pefts(rows: int, columns: int, count: int, density: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    deltas = [torch.randn(rows, columns, generator=generator) for _ in range(count)]
    if int(density * rows * columns) < 1:
        return
    theirs = pefts.ties(deltas, torch.ones(count), density)
    assert torch.allclose(blend_deltas(deltas, Blend("ties", density), "x"), theirs, atol=1e-6)


def test_dare_keeps_the_share_it_was_given_and_the_mean() -> None:
    ones = torch.ones(400, 500)
    found = blend_deltas([ones], Blend("dare", 0.25), "x")
    assert set(found.unique().tolist()) == {0.0, 4.0}
    assert float(found.mean()) == pytest.approx(1, abs=0.02)
    whole = [torch.randn(9, 9), torch.randn(9, 9)]
    assert torch.equal(blend_deltas(whole, Blend("dare", 1.0), "x"), whole[0] + whole[1])
    dropped = pefts.dare_ties(whole, torch.ones(2), 1.0)
    assert torch.allclose(blend_deltas(whole, Blend("dare-ties", 1.0), "x"), dropped, atol=1e-6)


def test_draws_belong_to_the_seed_and_the_module_and_not_to_the_threads(made: Path, tmp_path: Path) -> None:
    ones = torch.ones(40, 50)
    first, *others = (
        blend_deltas([ones], Blend("dare", 0.5, seed), name) for seed, name in itertools.product((0, 1), "xy")
    )
    assert not any(torch.equal(first, other) for other in others)
    for threads in (1, 3):
        terms = Terms(blend=Blend("dare-ties", 0.5, 7))
        apply(
            made / "model", [(made / "a", 1.0), (made / "b", 0.5)], tmp_path / str(threads), None, How(threads), terms
        )
    one, three = (tmp_path / name / "model.safetensors" for name in "13")
    assert one.read_bytes() == three.read_bytes()


def test_a_combined_patch_says_what_it_was_made_of(made: Path, tmp_path: Path) -> None:
    combine([(made / "a", 1.0), (made / "b", 0.25)], tmp_path / "sum")
    facts = json.loads((tmp_path / "sum" / "provenance.json").read_text())
    assert [part["scale"] for part in facts["combined"]] == [1.0, 0.25]
    assert altered(tmp_path / "sum") == []
    weights = tmp_path / "sum" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    assert altered(tmp_path / "sum") == ["adapter_model.safetensors"]


@pytest.mark.parametrize("made", ["llama"], indirect=True)
def test_embeddings_are_combined_too(made: Path, tmp_path: Path) -> None:
    for seed, name in enumerate("xy"):
        save_adapter(tmp_path / name, made / "model", seed, target_modules=["embed_tokens", "v_proj"])
    patches = [(tmp_path / "x", 1.0), (tmp_path / "y", 1.0)]
    combine(patches, tmp_path / "sum")
    apply(made / "model", patches, tmp_path / "direct")
    direct = load_file(tmp_path / "direct" / "model.safetensors")
    assert close(merged(made / "model", tmp_path / "sum", tmp_path / "out"), direct)


def test_patches_that_store_their_modules_differently_are_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "model", "gpt2")
    save_adapter(tmp_path / "head", tmp_path / "model", 1, r=2, target_modules=["lm_head"])
    save_adapter(tmp_path / "conv", tmp_path / "model", 2, r=2, target_modules=["c_proj"], fan_in_fan_out=True)
    patches = [(tmp_path / "head", 1.0), (tmp_path / "conv", 1.0)]
    for order in (patches, patches[::-1]):
        with pytest.raises(ResolveError, match=r"conv: fan_in_fan_out is true \(`.*c_proj`\), in .*head it is false"):
            combine(order, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("made", ["llama"], indirect=True)
def test_what_is_more_than_deltas_or_of_another_model_is_refused(made: Path, tmp_path: Path) -> None:
    dora = save_adapter(tmp_path / "dora", made / "model", use_dora=True)
    with pytest.raises(ResolveError, match="DoRA"):
        combine([(made / "a", 1.0), (dora, 1.0)], tmp_path / "out")
    with pytest.raises(ResolveError, match="DoRA"):
        apply(made / "model", [(dora, 1.0)], tmp_path / "out", terms=Terms(blend=Blend("ties")))
    wide = json.loads((made / "a" / "adapter_config.json").read_text()) | {"fan_in_fan_out": True}
    shutil.copytree(made / "a", tmp_path / "turned")
    (tmp_path / "turned" / "adapter_config.json").write_text(json.dumps(wide))
    with pytest.raises(ResolveError, match="not patches of one model"):
        combine([(made / "a", 1.0), (tmp_path / "turned", 1.0)], tmp_path / "out")
    with pytest.raises(ResolveError, match="overflow float32"):
        combine([(made / "a", 1e300)], tmp_path / "out")
    with pytest.raises(SpecError, match="rank"):
        combine([(made / "a", 1.0)], tmp_path / "out", rank=0)
    with pytest.raises(SpecError, match="density"):
        Blend("ties", 0.0)
    assert not (tmp_path / "out").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_the_command_combines_into_a_patch_or_a_model(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*arguments: object, code: int = 0) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["combine", *map(str, arguments), "--patch", str(made / "a"), "--patch", str(made / "b")])
        assert ended.value.code == code
        out, error = capsys.readouterr()
        return error if code else out

    assert "rank 8" in (told := said("--out", tmp_path / "p", "--scale", 1, "--scale", -1))
    assert "exact" in told
    assert "relative error" in said("--out", tmp_path / "t", "--method", "ties", "--rank", 4)
    found = json.loads(said("--out", tmp_path / "m", "--method", "dare", "--model", made / "model", "--json"))
    assert found[0]["touched"] > 0
    assert load(tmp_path / "m", torch.float32) is not None
    assert "exists already" in said("--out", tmp_path / "p", code=2)
    assert "--rank" in said("--out", tmp_path / "n", "--rank", 2, "--model", made / "model", code=2)
    assert "--scale: 1 for 2 patches" in said("--out", tmp_path / "n", "--scale", 1, code=2)
    assert "density" in said("--out", tmp_path / "n", "--method", "ties", "--density", 2, code=2)
    assert not (tmp_path / "n").exists()
