"""The one function that makes a ΔW, and the reading of tensors it needs.

ΔW_OI = scale · (B_OR · A_RI): torch on the CPU, in fp32, the whole tensor in one product, then the scale. numpy's
product, or one by row blocks, differs in last bits. Everything that adds a patch to anything (versions, apply,
resident models, export) adds this tensor. R rank, I in, O out; W is stored as W_OI, or W_IO in GPT-2's Conv1D.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from portllm.errors import ResolveError
from portllm.formats.adapter import Adapter, read_adapter, require_fits, weight_name
from portllm.formats.tensors import TensorEntry

DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu, "U16": torch.uint16, "I16": torch.int16,
    "F16": torch.float16, "BF16": torch.bfloat16, "U32": torch.uint32, "I32": torch.int32, "F32": torch.float32,
    "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64, "C64": torch.complex64,
}  # fmt: skip
"""torch's dtype by safetensors' name."""

Patches = Sequence[tuple[Path, float]]
"""Patch directories in the order they are added, each with its λ."""
Applied = tuple[Adapter, float]
"""An adapter and its λ."""


def read_tensor(entry: TensorEntry) -> torch.Tensor:
    """A stored tensor in memory of its own: torch aligns it, which the product's last bits may depend on."""
    bytes_N = torch.empty(entry.nbytes, dtype=torch.uint8)
    read_bytes(entry.file, entry.start, bytes_N.numpy().data)
    return bytes_N.view(DTYPES[entry.dtype]).reshape(entry.shape)


def read_bytes(file: Path, offset: int, buffer: memoryview) -> None:
    """Fills the buffer from a file, however many reads that takes (one gives at most 2 GiB)."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        done = 0
        while done < len(buffer):
            count = os.preadv(descriptor, [buffer[done:]], offset + done)
            if count == 0:
                raise ResolveError(f"{file}: ends before byte {offset + len(buffer)}; it changed while it was read")
            done += count
    finally:
        os.close(descriptor)


def delta(adapter: Adapter, module: str, scale: float = 1.0) -> torch.Tensor:
    """λ·ΔW of one module in fp32, in the orientation of the stored weight (ΔW_OI, or ΔW_IO where transposed).

    Equal to the bit to what PEFT's `merge_and_unload` adds; λ multiplies after PEFT's own scale, and λ = 1 is no λ.
    Raises `ResolveError` on a NaN or an infinity in either factor.
    """
    target = adapter.targets[module]
    A_RI, B_OR = _factor(target.A_RI, module), _factor(target.B_OR, module)
    dW_OI = B_OR @ A_RI
    dW = (dW_OI.T if adapter.transposed else dW_OI) * target.scale
    return dW if scale == 1.0 else dW * scale


def _factor(entry: TensorEntry, module: str) -> torch.Tensor:
    factor = read_tensor(entry).float()
    if not torch.isfinite(factor).all():
        raise ResolveError(f"{entry.file}: the factors of `{module}` hold NaN or infinity; the patch is damaged")
    return factor


def read_patches(patches: Patches, tensors: Mapping[str, TensorEntry], tied: bool) -> list[Applied]:
    """The patches' adapters, all of them checked against the model's tensors before any is added."""
    applied = [(read_adapter(directory), scale) for directory, scale in patches]
    for adapter, _ in applied:
        require_fits(adapter, tensors, tied)
    return applied


def touched(applied: Iterable[Applied], tensors: Mapping[str, TensorEntry]) -> dict[str, list[tuple[Applied, str]]]:
    """The stored tensors the patches change, by name: (patch, module) in the order they are added."""
    changes: dict[str, list[tuple[Applied, str]]] = {}
    for patch in applied:
        for module in patch[0].targets:
            name = weight_name(module, tensors)
            assert name is not None, "read_patches checked that every target fits"
            changes.setdefault(name, []).append((patch, module))
    return changes


def add(W: torch.Tensor, changes: Iterable[tuple[Applied, str]], dtype: torch.dtype) -> torch.Tensor:
    """round(W + Σ λΔW): summed in fp32 in order, rounded once to `dtype`. W is left as it was."""
    total = W.to(torch.float32, copy=True)
    for (adapter, scale), module in changes:
        total += delta(adapter, module, scale)
    return total.to(dtype)
