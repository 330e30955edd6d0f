"""An adapter is read when ΔW = scale·B·A is all it does, refused by name otherwise, and held against a model."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from portllm.errors import ResolveError
from portllm.formats.adapter import CONFIG, check_fits, read_adapter, require_fits, stored_name
from portllm.formats.tensors import ADAPTER, TensorEntry

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}


def factors(modules: dict[str, tuple[int, int, int]]) -> dict[str, np.ndarray]:
    """Zero factors for modules given as (O, R, I)."""
    arrays = {}
    for module, (out, rank, into) in modules.items():
        arrays[f"base_model.model.{module}.lora_A.weight"] = np.zeros((rank, into), "f4")
        arrays[f"base_model.model.{module}.lora_B.weight"] = np.zeros((out, rank), "f4")
    return arrays


def save(directory: Path, modules: Any = None, extra: Any = None, **config: Any) -> Path:
    directory.mkdir(exist_ok=True)
    save_file(factors(modules or {Q: (6, 4, 10), DOWN: (10, 4, 7)}) | (extra or {}), directory / ADAPTER)
    (directory / CONFIG).write_text(json.dumps(PLAIN | config))
    return directory


def stored(**weights: tuple[int, ...]) -> dict[str, TensorEntry]:
    return {f"{name}.weight": TensorEntry(Path("m"), "F32", shape, 0, 4) for name, shape in weights.items()}


def model(q: tuple[int, ...] = (6, 10), down: tuple[int, ...] = (10, 7)) -> dict[str, TensorEntry]:
    return stored(**{Q: q, DOWN: down, "model.embed_tokens": (20, 10)})


def test_a_plain_adapter_gives_rank_alpha_scale_and_shapes(tmp_path: Path) -> None:
    adapter = read_adapter(save(tmp_path / "a", base_model_name_or_path="org/base"))
    target = adapter.targets[DOWN]
    assert (target.rank, target.alpha, target.scale, target.shape) == (4, 8, 2.0, (10, 7))
    assert (target.A_RI.shape, target.B_OR.shape, target.A_RI.dtype) == ((4, 7), (10, 4), "F32")
    assert (adapter.base, target.transposed, list(adapter.targets)) == ("org/base", False, [Q, DOWN])


def test_rank_stabilised_lora_divides_by_the_root_of_the_rank(tmp_path: Path) -> None:
    assert read_adapter(save(tmp_path / "a", use_rslora=True)).targets[Q].scale == 8 / math.sqrt(4)


def test_patterns_override_rank_and_alpha_per_module(tmp_path: Path) -> None:
    adapter = read_adapter(
        save(
            tmp_path / "a",
            modules={Q: (6, 4, 10), DOWN: (10, 2, 7)},
            rank_pattern={"down_proj": 2},
            alpha_pattern={r"layers\.0\.self_attn\.q_proj": 3, "q_proj": 5},
        )
    )
    assert (adapter.targets[Q].scale, adapter.targets[DOWN].scale) == (3 / 4, 8 / 2)


REFUSED = {
    "target_parameters": ["x"],
    "trainable_token_indices": [1], "layer_replication": [[0, 4]], "use_qalora": True, "use_bdlora": {"nblocks": 2},
    "alora_invocation_tokens": [7], "arrow_config": {"top_k": 2}, "kasa_config": {"beta": 1},
    "velora_config": {"num_groups": 2}, "monteclora_config": {"x": 1}, "megatron_config": {"x": 1},
    "ensure_weight_tying": True, "a_field_of_next_year": 3,
}  # fmt: skip


@pytest.mark.parametrize("field", REFUSED)
def test_what_goes_beyond_a_delta_is_refused_by_name(tmp_path: Path, field: str) -> None:
    with pytest.raises(ResolveError, match=field):
        read_adapter(save(tmp_path / "a", **{field: REFUSED[field]}))


@pytest.mark.parametrize("field", REFUSED)
def test_the_same_fields_unset_are_fine(tmp_path: Path, field: str) -> None:
    read_adapter(save(tmp_path / "a", **{field: None}))


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "mica", "new"])
def test_an_initialisation_that_changes_the_base_is_refused(tmp_path: Path, init: str) -> None:
    with pytest.raises(ResolveError, match="init_lora_weights"):
        read_adapter(save(tmp_path / "a", init_lora_weights=init))


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal"])
def test_an_initialisation_of_the_factors_only_is_fine(tmp_path: Path, init: Any) -> None:
    read_adapter(save(tmp_path / "a", init_lora_weights=init))


@pytest.mark.parametrize("kind", ["IA3", "LOHA", "PROMPT_TUNING", None, 3])
def test_other_kinds_of_adapter_are_refused(tmp_path: Path, kind: Any) -> None:
    with pytest.raises(ResolveError, match="peft_type"):
        read_adapter(save(tmp_path / "a", peft_type=kind))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 0), ("r", "4"), ("r", None), ("r", True), ("r", 4.0), ("lora_alpha", "8"), ("lora_alpha", math.nan),
        ("lora_alpha", 10**400), ("rank_pattern", {"q_proj": -1}), ("rank_pattern", ["q_proj"]),
        ("alpha_pattern", {"q_proj": None}), ("rank_pattern", {"(": 4}), ("use_rslora", "yes"), ("fan_in_fan_out", 2),
    ],
)  # fmt: skip
def test_a_wrong_type_in_the_configuration_is_one_clear_error(tmp_path: Path, field: str, value: Any) -> None:
    with pytest.raises(ResolveError, match=CONFIG):
        read_adapter(save(tmp_path / "a", **{field: value}))


@pytest.mark.parametrize(
    "key",
    [
        "base_model.model.lm_head.weight",
        f"base_model.model.{Q}.bias",
        f"{Q}.lora_A.weight",
        f"base_model.model.{Q}.lora_A.default.weight",
    ],
)
def test_an_unknown_tensor_is_refused_and_never_skipped(tmp_path: Path, key: str) -> None:
    with pytest.raises(ResolveError, match="cannot be applied exactly"):
        read_adapter(save(tmp_path / "a", extra={key: np.zeros((4, 4), "f4")}))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "empty"),
        ({"base_model.model.x.lora_A.weight": np.zeros((4, 3), "f4")}, "`x` has lora_A only, no lora_B"),
        (factors({"x": (3, 4, 3)}) | {"base_model.model.x.lora_magnitude_vector": np.zeros(3, "f4")}, "use_dora"),
        (factors({"x": (3, 4, 3)}) | {"base_model.model.x.lora_B.bias": np.zeros(3, "f4")}, "lora_bias"),
        ({"base_model.model.x.lora_embedding_A": np.zeros((4, 9), "f4")}, "no lora_B"),
        (factors({"x": (3, 8, 3)}), "configured rank 4"),
        (factors({"x": (3, 4, 0)}), "matrix with content"),
        ({k: v.reshape(*v.shape, 1, 1) for k, v in factors({"x": (3, 4, 3)}).items()}, "matrix with content"),
        ({k: v.astype("i4") for k, v in factors({"x": (3, 4, 3)}).items()}, "stored as I32"),
    ],
)
def test_damaged_factors_are_refused(tmp_path: Path, arrays: Any, message: str) -> None:
    directory = save(tmp_path / "a")
    save_file(arrays, directory / ADAPTER)
    with pytest.raises(ResolveError, match=message):
        read_adapter(directory)


def test_a_missing_part_of_the_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ResolveError, match="no such patch"):
        read_adapter(tmp_path / "none")
    directory = save(tmp_path / "a")
    (directory / ADAPTER).rename(directory / "adapter_model.bin")
    with pytest.raises(ResolveError, match="safetensors only"):
        read_adapter(directory)
    (directory / CONFIG).unlink()
    with pytest.raises(ResolveError, match=CONFIG):
        read_adapter(directory)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=4), st.lists, max_leaves=4), st.data())
def test_any_configuration_gives_an_adapter_or_one_error(tmp_path: Path, value: Any, data: Any) -> None:
    field = data.draw(
        st.sampled_from([*PLAIN, *REFUSED, "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out"])
    )
    directory = save(tmp_path / "a", **{field: value})
    try:
        assert read_adapter(directory).targets.keys() == {Q, DOWN}
    except ResolveError as error:
        assert CONFIG in str(error) or ADAPTER in str(error)  # noqa: PT017


def test_a_fitting_adapter_has_no_mismatch(tmp_path: Path) -> None:
    assert check_fits(read_adapter(save(tmp_path / "a")), model()) == []


def test_a_patch_of_a_deeper_model_is_told_by_its_layers(tmp_path: Path) -> None:
    adapter = read_adapter(save(tmp_path / "a", modules={Q: (6, 4, 10), "model.layers.40.mlp.up_proj": (7, 4, 10)}))
    tensors = stored(**{f"model.layers.{i}.self_attn.q_proj": (6, 10) for i in range(32)})
    with pytest.raises(
        ResolveError,
        match=r"patch targets `model.layers.40.mlp.up_proj`, the version has 32 layers: it was trained on another",
    ):
        require_fits(adapter, tensors)


def test_a_patch_of_another_architecture_is_told_by_its_names(tmp_path: Path) -> None:
    adapter = read_adapter(save(tmp_path / "a"))
    tensors = stored(**{"transformer.h.0.attn.c_attn": (10, 30)})
    assert [m.module for m in check_fits(adapter, tensors)] == [Q, DOWN]
    with pytest.raises(ResolveError, match=r"another architecture \(and 1 more of 2 targets"):
        require_fits(adapter, tensors)


def test_a_patch_of_another_width_is_told_by_both_shapes(tmp_path: Path) -> None:
    with pytest.raises(ResolveError, match="version's weight is 60×100, the patch's 6×10: it was trained on another"):
        require_fits(read_adapter(save(tmp_path / "a")), model(q=(60, 100)))


def test_fan_in_fan_out_turns_the_shape_and_a_wrong_flag_is_told(tmp_path: Path) -> None:
    turned = read_adapter(save(tmp_path / "a", fan_in_fan_out=True))
    assert check_fits(turned, model(q=(10, 6), down=(7, 10))) == []
    with pytest.raises(ResolveError, match=r"fan_in_fan_out in adapter_config.json should be the other way round"):
        require_fits(turned, model())


def test_a_patch_on_a_tied_head_is_refused_with_the_mend(tmp_path: Path) -> None:
    adapter = read_adapter(save(tmp_path / "a", modules={"lm_head": (20, 4, 10)}))
    tensors = stored(lm_head=(20, 10))
    assert check_fits(adapter, tensors) == []
    with pytest.raises(ResolveError, match="untie"):
        require_fits(adapter, tensors, tied=True)


def test_quantised_weights_take_no_patch(tmp_path: Path) -> None:
    tensors = {n: TensorEntry(e.file, "I8", e.shape, 0, 1) for n, e in model().items()}
    with pytest.raises(ResolveError, match="stores it as I8"):
        require_fits(read_adapter(save(tmp_path / "a")), tensors)


def test_a_bare_models_names_lack_the_prefix_of_the_whole() -> None:
    assert stored_name("transformer.h.0.c_attn.weight", stored(**{"h.0.c_attn": (1,)})) == "h.0.c_attn.weight"
    both = stored(**{"h.0.c_attn": (1,), "transformer.wte": (1,)})
    assert stored_name("transformer.h.0.c_attn.weight", both) is None


@pytest.mark.parametrize(
    ("loaded", "files"),
    [
        ("model.language_model.layers.0.mlp.up_proj", "language_model.model.layers.0.mlp.up_proj"),
        ("lm_head", "language_model.lm_head"),
        ("model.vision_tower.embeddings", "vision_tower.embeddings"),
        ("model.layers.0.mlp.up_proj", "model.language_model.layers.0.mlp.up_proj"),
        ("model.layers.0.mlp.up_proj", "language_model.model.layers.0.mlp.up_proj"),
        ("model.layers.0.mixer.in_proj", "backbone.layers.0.mixer.in_proj"),
        ("lm_head", "embed_out"),
    ],
)
def test_what_is_renamed_one_to_one_on_loading_is_found_under_its_stored_name(loaded: str, files: str) -> None:
    name, there = f"{loaded}.weight", stored(**{files: (1,)})
    assert stored_name(name, there) == f"{files}.weight"
    assert stored_name(name, there | stored(**{loaded: (1,)})) == name
    assert stored_name(name.replace("0", "1"), there) == (None if "0" in name else f"{files}.weight")


def vector(length: int) -> np.ndarray:
    return np.ones(length, "f4")


def test_more_than_deltas_is_told_apart_and_has_no_multiple(tmp_path: Path) -> None:
    plain = read_adapter(save(tmp_path / "plain"))
    assert (plain.beyond_deltas, plain.replaced, plain.copies) == (None, {}, {})
    lengths = {f"base_model.model.{m}.lora_magnitude_vector": vector(o) for m, o in ((Q, 6), (DOWN, 10))}
    dora = read_adapter(save(tmp_path / "dora", extra=lengths, use_dora=True))
    assert dora.beyond_deltas == f"scales `{Q}` (DoRA)"
    bias = {f"base_model.model.{Q}.base_layer.bias": vector(6), "base_model.model.model.norm.bias": vector(10)}
    biased = read_adapter(save(tmp_path / "bias", extra=bias, bias="all"))
    assert set(biased.replaced) == {f"{Q}.bias", "model.norm.bias"}
    saved = {"base_model.model.lm_head.weight": np.ones((20, 10), "f4")}
    head = read_adapter(save(tmp_path / "head", extra=saved, modules_to_save=["lm_head"]))
    norms = {"base_model.model.model.layers.0.input_layernorm.weight": np.ones(10, "f4")}
    norm = read_adapter(save(tmp_path / "norm", extra=norms, modules_to_save=["norm"]))
    assert set(norm.replaced) == {"model.layers.0.input_layernorm.weight"}  # as PEFT: names that end so
    assert head.beyond_deltas == "replaces `lm_head.weight`"


def test_an_embedding_is_stored_transposed_and_may_carry_its_base_along(tmp_path: Path) -> None:
    name = "base_model.model.model.embed_tokens"
    extra = {f"{name}.lora_embedding_A": np.zeros((4, 20), "f4"), f"{name}.lora_embedding_B": np.zeros((10, 4), "f4")}
    adapter = read_adapter(save(tmp_path / "a", extra=extra | {f"{name}.base_layer.weight": np.zeros((20, 10), "f4")}))
    target = adapter.targets["model.embed_tokens"]
    assert (target.shape, target.stored_shape, target.transposed) == ((10, 20), (20, 10), True)
    assert set(adapter.copies) == {"model.embed_tokens.weight"} and adapter.beyond_deltas is None
    assert check_fits(adapter, model()) == []
    with pytest.raises(ResolveError, match="`model.embed_tokens`, the version ties head and embeddings"):
        require_fits(adapter, model(), tied=True)


def test_a_bias_needs_one_in_the_model(tmp_path: Path) -> None:
    extra = {f"base_model.model.{m}.lora_B.bias": vector(o) for m, o in ((Q, 6), (DOWN, 10))}
    adapter = read_adapter(save(tmp_path / "a", extra=extra, lora_bias=True))
    with pytest.raises(ResolveError, match=f"`{Q}`, the version has no bias there"):
        require_fits(adapter, model())
    biases = {
        f"{Q}.bias": TensorEntry(Path("m"), "F32", (6,), 0, 4),
        f"{DOWN}.bias": TensorEntry(Path("m"), "F32", (10,), 0, 4),
    }
    assert check_fits(adapter, model() | biases) == []
