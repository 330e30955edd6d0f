"""The arithmetic of θ + Σ λΔθ, and the reading of tensors it needs. Everything that adds a patch to anything (versions,
apply, resident models, export) does it here.

ΔW_OI = scale · (B_OR · A_RI): torch on the CPU, in fp32, the whole tensor in one product. numpy's product, or one by
row blocks, differs in last bits. Scaling, adding and rounding go by blocks of rows that stay in the cache, in buffers
that are used again: fresh memory costs a page fault every 4 KB. R rank, I in, O out; W is stored as W_OI, or W_IO in
GPT-2's Conv1D.
"""

import math
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from portllm.errors import ResolveError
from portllm.formats.adapter import Adapter, stored_name
from portllm.formats.tensors import TensorEntry
from portllm.work.blending import blend_deltas
from portllm.work.changes import Applied, Blended, Change, Delta, Replacement, Rounding

DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu, "U16": torch.uint16, "I16": torch.int16,
    "F16": torch.float16, "BF16": torch.bfloat16, "U32": torch.uint32, "I32": torch.int32, "F32": torch.float32,
    "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64, "C64": torch.complex64,
}  # fmt: skip
"""torch's dtype by safetensors' name."""
BLOCK = 1 << 18
"""Elements that are scaled, added and rounded at once: their fp32 copies stay in the cache (2^16: 2.4 s for a patch on
all linear layers of 1.1B parameters, 2^17 to 2^20: 1.7 to 1.9 s)."""


class Workspace:
    """Buffers of each thread, as large as the largest tensor it worked on."""

    def __init__(self, threads: int = 1) -> None:
        """Several `threads` get one thread of torch's own each; `close` gives torch its threads back."""
        self._held = threading.local()
        self._before = torch.get_num_threads()
        if threads > 1:
            torch.set_num_threads(1)

    def take(self, role: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The thread's buffer of that role, with whatever it held last."""
        count = 1
        for size in shape:
            count *= size
        if not hasattr(self._held, "buffers"):
            self._held.buffers = {}
        buffer = self._held.buffers.get(role)
        if buffer is None or buffer.numel() < count * dtype.itemsize:
            buffer = self._held.buffers[role] = torch.empty(count * dtype.itemsize, dtype=torch.uint8)
        return buffer[: count * dtype.itemsize].view(dtype).view(tuple(shape))

    def close(self) -> None:
        if torch.get_num_threads() != self._before:
            torch.set_num_threads(self._before)


def read_tensor(entry: TensorEntry) -> Tensor:
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


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor as safetensors stores them, without a copy where it is contiguous."""
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def delta(adapter: Adapter, module: str, scale: float = 1.0) -> Tensor:
    """λ·ΔW of one module in fp32, in the orientation of the stored weight (ΔW_OI, or ΔW_IO where transposed).

    Equal to the bit to what PEFT's `merge_and_unload` adds; λ multiplies after PEFT's own scale, and λ = 1 is no λ.
    Raises `ResolveError` on a NaN or an infinity in either factor.
    """
    dW = product(adapter, module, Workspace()) * adapter.targets[module].scale
    return dW if scale == 1.0 else dW * scale


def blended(change: Blended) -> Tensor:
    """The one delta in fp32, in the orientation of the stored weight."""
    deltas = [delta(part.adapter, part.module, part.scale) for part in change.parts]
    return blend_deltas(deltas, change.how, change.parts[0].module)


def product(adapter: Adapter, module: str, workspace: Workspace) -> Tensor:
    """B·A in fp32, in the orientation of the stored weight, in the workspace."""
    target = adapter.targets[module]
    A_RI, B_OR = _factor(target.A_RI, module), _factor(target.B_OR, module)
    dW_OI = torch.mm(B_OR, A_RI, out=workspace.take("product", target.shape, torch.float32))
    return dW_OI.T if target.transposed else dW_OI


def _factor(entry: TensorEntry, module: str) -> Tensor:
    factor = read_tensor(entry).float()
    if not torch.isfinite(factor).all():
        raise ResolveError(f"{entry.file}: the factors of `{module}` hold NaN or infinity; the patch is damaged")
    return factor


def require_same_copies(applied: Iterable[Applied], tensors: Mapping[str, TensorEntry]) -> None:
    """Weights that PEFT saved along must be the version's own: on another version they would undo its update."""
    for adapter, _ in applied:
        for name, copy in adapter.copies.items():
            stored = stored_name(name, tensors)
            assert stored is not None, "read_patches checked that everything fits"
            if not torch.equal(read_tensor(copy).float(), read_tensor(tensors[stored]).float()):
                raise ResolveError(
                    f"{adapter.directory}: carries the `{name}` it was trained on, and this version's differs: save "
                    "the adapter again with save_pretrained(…, save_embedding_layers=False)"
                )


def add(W: Tensor, changes: Sequence[Change], dtype: torch.dtype) -> Tensor:
    """round(W + Σ λΔW): summed in fp32 in order, rounded once to `dtype`. W is left as it was."""
    return add_into(torch.empty(W.shape, dtype=dtype), W, changes, Workspace())


def patched(name: str, entry: TensorEntry, changes: Sequence[Change], dtype: str, workspace: Workspace) -> memoryview:
    """The bytes of a stored tensor with its changes, in safetensors' `dtype`; they stay in the workspace."""
    W = workspace.take("stored", entry.shape, DTYPES[entry.dtype])
    read_bytes(entry.file, entry.start, tensor_bytes(W))
    made = add_into(workspace.take("made", entry.shape, DTYPES[dtype]), W, changes, workspace)
    if not changes and made.dtype != W.dtype and bool((torch.isfinite(W) & ~torch.isfinite(made)).any()):
        raise ResolveError(f"`{name}`: holds values that {str(made.dtype).removeprefix('torch.')} cannot: choose "
                           f"another --dtype, or keep {str(W.dtype).removeprefix('torch.')}")  # fmt: skip
    return tensor_bytes(made)


def add_into(out: Tensor, W: Tensor, changes: Sequence[Change], workspace: Workspace) -> Tensor:
    """As `add`, into `out`."""
    if not changes:
        return out.copy_(W)
    parameter = changes[-1].parameter
    *first, last = changes
    if first:  # the sum so far is kept in fp32
        total = workspace.take("total", W.shape, torch.float32).copy_(W)
        for change in first:
            _change(total, total, change, workspace)
        W = total
    return _require_finite(_change(out, W, last, workspace), parameter)


def _require_finite(out: Tensor, parameter: str) -> Tensor:
    """Raises `ResolveError` for a NaN or an infinity; a block is looked at closely only where its sum is not finite."""
    if out.is_floating_point():
        for part in out.reshape(-1).split(BLOCK) if out.is_contiguous() else (out,):
            if not math.isfinite(float(part.sum(dtype=torch.float32))) and not torch.isfinite(part).all():
                kind = str(out.dtype).removeprefix("torch.")
                raise ResolveError(f"`{parameter}`: holds NaN or infinity once the patch is added: the sum overflows "
                                   f"{kind}, or the model's own weight is damaged; lower the scale")  # fmt: skip
    return out


def _change(out: Tensor, W: Tensor, change: Change, workspace: Workspace) -> Tensor:
    """One change of W into `out`, which may be W."""
    if isinstance(change, Replacement):
        return out.copy_(_factor(change.entry, change.parameter))
    if isinstance(change, Rounding):
        return out.copy_(W.to(DTYPES[change.dtype]))
    if isinstance(change, Blended):
        return out.copy_(W.float() + blended(change))
    target = change.adapter.targets[change.module]
    if change.part == "bias":
        assert target.bias is not None
        bias_O = _factor(target.bias, change.module) * target.scale
        return out.copy_(W.float() + (bias_O if change.scale == 1.0 else bias_O * change.scale))
    if target.magnitude is not None:
        return out.copy_(_dora(W.float(), change, _factor(target.magnitude, change.module)))
    return _add_delta(out, W, change, workspace)


def _dora(W: Tensor, change: Delta, magnitude_O: Tensor) -> Tensor:
    """magnitude · (W + ΔW) / ‖W + ΔW‖, the length taken over each output's row (column where W is transposed)."""
    transposed = change.adapter.targets[change.module].transposed
    moved = W + delta(change.adapter, change.module, change.scale)
    moved_OI = moved.T if transposed else moved
    factor_O1 = (magnitude_O / torch.linalg.norm(moved_OI, dim=1))[:, None]
    return (factor_O1.T if transposed else factor_O1) * moved


def _add_delta(out: Tensor, W: Tensor, change: Delta, workspace: Workspace) -> Tensor:
    """out = W + λΔW by blocks of rows."""
    dW = product(change.adapter, change.module, workspace)
    factor = change.adapter.targets[change.module].scale
    rows = max(1, BLOCK // W.shape[1])
    part = workspace.take("delta", (rows, W.shape[1]), torch.float32)
    sums = workspace.take("sum", (rows, W.shape[1]), torch.float32)
    for start in range(0, len(W), rows):
        here = slice(start, start + rows)
        count = len(W[here])
        torch.mul(dW[here], factor, out=part[:count])
        if change.scale != 1.0:
            part[:count] *= change.scale
        sums[:count].copy_(W[here])
        out[here] = sums[:count].add_(part[:count])
    return out
