"""Summed token cross-entropy that never holds all logits: the head runs only where a target is.

Shape suffixes: B sequences, T tokens, N positions with a target, H hidden, V vocabulary.
"""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import checkpoint

from portllm.errors import StageError
from portllm.formats.dropout import dropouts, is_dropout
from portllm.work.head import Head, body
from portllm.work.last_layer import LastLayer
from portllm.work.packing import keeps_apart

BLOCK_LOGITS = 2**25
"""Logits alive at once where the head must be called as a module: 128 MB in fp32."""

BLOCK_ROWS = 2**14
"""Rows of the head's gradient that a product adds to: its result is a copy as large as they are."""


class SummedLoss(nn.Module):
    """Sum of −log p(target) over all targets, as ONE module: ZeRO-3 gathers weights in a module's forward."""

    def __init__(self, model: Any) -> None:
        """Raises StageError for an architecture whose logits are more than head(body(x))."""
        super().__init__()
        self.model = model
        self.head = Head(model)
        self.last_layer = LastLayer(model)

    @cached_property
    def apart(self) -> bool:
        """Whether `positions_BT` are heeded; two short passes find out, where documents are packed at all."""
        return keeps_apart(self.model)

    def forward(
        self, ids_BT: Tensor, positions_BT: Tensor | None, rows_N: Tensor, targets_N: Tensor, blocks: int
    ) -> Tensor:
        """Σ −log p(target), an fp32 scalar; 0 without targets, with a graph that still reaches the weights.

        `positions_BT` are given where a row holds several documents, which are kept apart if the model can.
        `blocks` is the same on every rank, whatever its number of rows: ZeRO-3 gathers the head once per block.
        """
        documents = {"position_ids": positions_BT} if positions_BT is not None and self.apart else {}
        with self.last_layer.reading(rows_N, ids_BT.numel()):
            hidden_BTH = body(self.model)(input_ids=ids_BT, use_cache=False, **documents).last_hidden_state
        hidden_NH = hidden_BTH.flatten(0, 1)[rows_N]
        if (parameters := self.head.parameters) is not None:
            return LinearLoss.apply(hidden_NH, *parameters, targets_N, self.head)
        if blocks == 1:
            return self.block(hidden_NH, targets_N)
        parts = zip(hidden_NH.tensor_split(blocks), targets_N.tensor_split(blocks), strict=True)
        return torch.stack([checkpoint(self.block, h, t, use_reentrant=False) for h, t in parts]).sum()

    def block(self, hidden_NH: Tensor, targets_N: Tensor) -> Tensor:
        return cross_entropy(self.head.whole(hidden_NH), targets_N, reduction="sum")


class LinearLoss(torch.autograd.Function):
    """The loss through a linear head whose weights are at hand.

    The gradients are made in the forward pass, from logits that are made once and never kept: two products with a head
    that is frozen, three with one that trains (through autograd and checkpoints three and four). They are scaled in
    place and given away (a copy is as large as the head), so a second backward pass through one loss is an error.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, targets_N: Tensor, head: Head
    ) -> Tensor:
        sums: list[Tensor | None] = [
            torch.zeros_like(x, dtype=torch.float32) if wanted and x is not None else None
            for x, wanted in zip((hidden_NH, weight_VH, bias_V), ctx.needs_input_grad, strict=False)
        ]
        of_hidden, of_weight, of_bias = sums
        loss = torch.zeros((), dtype=torch.float64, device=hidden_NH.device)
        for here, log_P, slope_PV in head.slopes(hidden_NH, targets_N):
            loss -= log_P.sum(dtype=torch.float64)
            if of_hidden is not None:
                of_hidden[here] = slope_PV @ weight_VH
            if of_weight is not None:
                blocks = zip(of_weight.split(BLOCK_ROWS), slope_PV.split(BLOCK_ROWS, dim=1), strict=True)
                for of_block, slope_PB in blocks:
                    of_block += slope_PB.T @ hidden_NH[here]
            if of_bias is not None:
                of_bias += slope_PV.sum(dim=0, dtype=torch.float32)
        owners = (hidden_NH, weight_VH, bias_V)
        ctx.gradients = [s if x is None or s is None else s.to(x.dtype) for s, x in zip(sums, owners, strict=True)]
        return loss.float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradients of this loss are given away: make it again for another backward pass")
        gradients, ctx.gradients = ctx.gradients, None
        return (*(g if g is None else g.mul_(scale) for g in gradients), None, None)


def vocabulary(model: Any) -> int:
    return int(model.config.get_text_config().vocab_size)


def head_blocks(model: Any, rows: int) -> int:
    """Blocks in which a head that is called as a module takes `rows` positions."""
    return max(1, -(-rows * vocabulary(model) // BLOCK_LOGITS))


def require_no_dropout(model: Any) -> None:
    """Raises StageError where a training would drop anything: its masks would depend on ranks and micro-batches."""
    stated = dropouts(model.config.to_dict())
    mend = "give the model as a directory (`path`) whose config.json says 0"
    if not stated:
        stated = {f"{place}.{name}": p for place, module in model.named_modules() for name, p in _drops(module).items()}
        mend = "write `lora_dropout`: 0 in the adapter_config.json of the patch that is trained further"
        if not all(".lora_dropout." in name for name in stated):
            mend = f"{type(model).__name__} states it in no configuration, and cannot be trained"
    if stated:
        (name, value), *more = stated.items()
        others = f" (and {len(more)} more)" if more else ""
        raise StageError(f"the model's `{name}` is {value}{others}, and a training here has no dropout: {mend}")


def _drops(module: nn.Module) -> dict[str, float]:
    """Dropouts of a module that are not 0, by attribute."""
    own = {"p": module.p} if isinstance(module, _DropoutNd) and module.p else {}
    return own | {name: value for name, value in vars(module).items() if is_dropout(name, value)}
