"""One function makes every ΔW, and it makes PEFT's to the bit."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.lora import Linear
from safetensors.torch import save_file

from portllm.errors import ResolveError
from portllm.formats.adapter import CONFIG, Adapter, read_adapter
from portllm.formats.tensors import ADAPTER, TensorEntry, read_header
from portllm.work.changes import Delta, read_patches
from portllm.work.patches import add, delta, read_bytes, read_tensor
from tests.work.checkpoints import bits

many = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = st.tuples(st.integers(1, 150), st.integers(1, 17), st.integers(1, 150))


def adapter_of(directory: Path, A_RI: torch.Tensor, B_OR: torch.Tensor, **config: Any) -> Adapter:
    """An adapter on the module `x`."""
    directory.mkdir(exist_ok=True)
    halves = {"A": A_RI, "B": B_OR}
    save_file({f"base_model.model.x.lora_{h}.weight": t for h, t in halves.items()}, directory / ADAPTER)
    settings = {"peft_type": "LORA", "r": A_RI.shape[0], "lora_alpha": 16} | config
    (directory / CONFIG).write_text(json.dumps(settings))
    return read_adapter(directory)


def drawn(shape: tuple[int, int, int], seed: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    out, rank, into = shape
    generator = torch.Generator().manual_seed(seed)
    A_RI = torch.randn(rank, into, generator=generator).to(dtype)
    return A_RI, torch.randn(out, rank, generator=generator).to(dtype)


def peft_merge(W_OI: torch.Tensor, A_RI: torch.Tensor, B_OR: torch.Tensor, alpha: float, rslora: bool) -> torch.Tensor:
    """PEFT's merge into one linear layer, its factors in fp32 as `PeftModel.from_pretrained` loads them."""
    base = torch.nn.Linear(W_OI.shape[1], W_OI.shape[0], bias=False, dtype=W_OI.dtype)
    base.weight.data = W_OI.clone()
    config = LoraConfig(r=A_RI.shape[0], lora_alpha=alpha, use_rslora=rslora)  # type: ignore[arg-type]
    layer = Linear(base, "default", config, r=A_RI.shape[0], lora_alpha=alpha)  # type: ignore[arg-type]
    layer.lora_A["default"].weight.data = A_RI.float()
    layer.lora_B["default"].weight.data = B_OR.float()
    layer.merge()
    return base.weight.data


@many
@given(SHAPES, st.integers(0, 99), st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.booleans(), st.floats(0.1, 99))
def test_a_merged_weight_is_pefts_to_the_bit(
    tmp_path: Path, shape: Any, seed: int, stored: torch.dtype, trained: torch.dtype, rslora: bool, alpha: float
) -> None:
    A_RI, B_OR = drawn(shape, seed, trained)
    W_OI = torch.randn(shape[0], shape[2], generator=torch.Generator().manual_seed(seed + 1)).to(stored)
    adapter = adapter_of(tmp_path / "a", A_RI, B_OR, lora_alpha=alpha, use_rslora=rslora)
    ours = add(W_OI, [Delta(adapter, "x")], stored)
    assert torch.equal(bits(ours), bits(peft_merge(W_OI, A_RI, B_OR, alpha, rslora)))


@many
@given(SHAPES, st.integers(0, 99), st.floats(-4, 4, width=32))
def test_lambda_multiplies_after_the_scale_and_one_is_no_lambda(
    tmp_path: Path, shape: Any, seed: int, scale: float
) -> None:
    adapter = adapter_of(tmp_path / "a", *drawn(shape, seed, torch.float32))
    dW_OI = delta(adapter, "x")
    assert dW_OI.dtype == torch.float32
    assert torch.equal(bits(delta(adapter, "x", 1.0)), bits(dW_OI))
    assert torch.equal(delta(adapter, "x", scale), dW_OI * scale)


@many
@given(SHAPES, st.integers(0, 99))
def test_fan_in_fan_out_gives_the_transpose(tmp_path: Path, shape: Any, seed: int) -> None:
    A_RI, B_OR = drawn(shape, seed, torch.float32)
    plain = delta(adapter_of(tmp_path / "a", A_RI, B_OR), "x")
    turned = delta(adapter_of(tmp_path / "b", A_RI, B_OR, fan_in_fan_out=True), "x")
    assert torch.equal(bits(turned.T), bits(plain))


@many
@given(st.integers(0, 99), st.sampled_from(DTYPES))
def test_several_deltas_are_summed_in_fp32_in_order_and_rounded_once(
    tmp_path: Path, seed: int, stored: torch.dtype
) -> None:
    adapters = [adapter_of(tmp_path / str(i), *drawn((31, 4, 17), seed + i, torch.float32)) for i in range(3)]
    W_OI = torch.randn(31, 17).to(stored)
    before = W_OI.clone()
    total = W_OI.float()
    for adapter, scale in zip(adapters, (1.0, 0.5, -2.0), strict=True):
        total = total + delta(adapter, "x", scale)
    changes = [Delta(adapter, "x", scale) for adapter, scale in zip(adapters, (1.0, 0.5, -2.0), strict=True)]
    assert torch.equal(bits(add(W_OI, changes, stored)), bits(total.to(stored)))
    assert torch.equal(bits(W_OI), bits(before))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_factor_that_is_not_finite_is_refused_by_name(tmp_path: Path, value: float) -> None:
    A_RI, B_OR = drawn((5, 2, 5), 0, torch.float32)
    B_OR[3, 1] = value
    with pytest.raises(ResolveError, match="`x` hold NaN or infinity"):
        delta(adapter_of(tmp_path / "a", A_RI, B_OR), "x")


def test_every_dtype_and_shape_reads_as_it_was_written(tmp_path: Path) -> None:
    arrays = {
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4, dtype=torch.bfloat16),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "flags": torch.tensor([True, False]),
        "long": torch.arange(3),
        "f8": torch.tensor([1.5, -2.0]).to(torch.float8_e4m3fn),
    }
    save_file(arrays, tmp_path / "x.safetensors")
    for name, entry in read_header(tmp_path / "x.safetensors").items():
        read = read_tensor(entry)
        assert (read.dtype, read.shape) == (arrays[name].dtype, arrays[name].shape)
        assert torch.equal(bits(read), bits(arrays[name]))


def test_a_file_that_shrank_since_its_header_was_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"123")
    with pytest.raises(ResolveError, match="changed while it was read"):
        read_bytes(tmp_path / "x", 1, memoryview(bytearray(8)))


def test_every_patch_is_checked_before_any_is_added(tmp_path: Path) -> None:
    adapter_of(tmp_path / "fits", *drawn((5, 2, 5), 0, torch.float32))
    adapter_of(tmp_path / "odd", *drawn((6, 2, 5), 0, torch.float32))
    tensors = {"x.weight": TensorEntry(tmp_path, "F32", (5, 5), 0, 100)}
    with pytest.raises(ResolveError, match=r"odd: patch targets `x`"):
        read_patches([(tmp_path / "fits", 1.0), (tmp_path / "odd", 1.0)], tensors, tied=False)
