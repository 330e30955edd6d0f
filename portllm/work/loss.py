"""Summed token cross-entropy that never holds all logits: the head runs in blocks of rows, only where a target is.

Shape suffixes: B sequences, T tokens, N positions with a target, H hidden, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from portllm.errors import StageError

BLOCK_LOGITS = 2**25
"""Logits alive at once, at most: 128 MB in fp32. With 262k tokens that is 128 rows, with 32k 1,024."""


class SummedLoss(nn.Module):
    """Sum of −log p(target) over all targets, as ONE module: ZeRO-3 gathers weights in a module's forward."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids_BT: Tensor, rows_N: Tensor, targets_N: Tensor, blocks: int) -> Tensor:
        """Σ −log p(target), an fp32 scalar; 0 without targets, with a graph that still reaches the weights.

        `blocks` is the same on every rank, whatever its number of rows: ZeRO-3 gathers the head once per block.
        """
        hidden_NH = hidden(self.model, ids_BT)[rows_N]
        if blocks == 1:
            return self.block(hidden_NH, targets_N)
        parts = zip(hidden_NH.tensor_split(blocks), targets_N.tensor_split(blocks), strict=True)
        return torch.stack([checkpoint(self.block, h, t, use_reentrant=False) for h, t in parts]).sum()

    def block(self, hidden_NH: Tensor, targets_N: Tensor) -> Tensor:
        return cross_entropy(head(self.model, hidden_NH), targets_N, reduction="sum")


def hidden(model: Any, ids_BT: Tensor) -> Tensor:
    """The body's last hidden states, [B·T, H]."""
    body = getattr(model, model.base_model_prefix)
    return body(input_ids=ids_BT, use_cache=False).last_hidden_state.flatten(0, 1)


def head(model: Any, hidden_NH: Tensor) -> Tensor:
    """Logits in fp32, [N, V]."""
    logits_NV = model.get_output_embeddings()(hidden_NH).float()
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return logits_NV if cap is None else cap * torch.tanh(logits_NV / cap)


def vocabulary(model: Any) -> int:
    return int(model.config.get_text_config().vocab_size)


def head_blocks(model: Any, rows: int) -> int:
    """Blocks in which the head takes `rows` positions."""
    return max(1, -(-rows * vocabulary(model) // BLOCK_LOGITS))


@torch.no_grad()
def check_head(model: Any) -> None:
    """Refuses an architecture whose logits are not made as `head` makes them (a scale or bias it does not know)."""
    ids_BT = torch.arange(8, device=next(model.parameters()).device).remainder(vocabulary(model))[None]
    ours_NV, theirs_NV = head(model, hidden(model, ids_BT)), model(input_ids=ids_BT).logits[0].float()
    if not torch.allclose(ours_NV, theirs_NV, rtol=0, atol=0.02 * float(theirs_NV.abs().max())):
        raise StageError(f"model type `{model.config.model_type}` makes its logits in a way this loss does not know")


def silence_dropout(model: Any) -> None:
    """Sets every dropout to 0: masks would depend on ranks and micro-batches."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
