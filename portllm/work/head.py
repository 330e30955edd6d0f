"""A model's head: from hidden states to log p, one block of the vocabulary at a time, never all logits at once.

Shape suffixes: B rows, S positions, D hidden size, P scored positions, V a block of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch

from portllm.errors import StageError

VOCABULARY = 2048
"""Tokens per block of the vocabulary: the fastest of 2k to 16k at 32k and 262k entries (1.1 to 1.4 times the product
and log-softmax of all logits at once, whose allocation is what costs)."""

LOGITS = 2**26
"""Logits at once in a training, and on a device: 256 MB in fp32. Whole rows are made once and turned into slopes
in place, where blocks of the vocabulary had to be made twice: 1.3 to 1.9 times as fast."""
CACHED = 2**20
"""Logits turned into slopes at once on a CPU: what stays in its cache. A GPU turns all it has: with 262,144 entries and
16,384 targets these would be 61,000 calls."""


def positions_at_once(device: torch.device) -> int:
    """Positions per product with the head: 256-512 ran fastest on a CPU; a GPU wants few and large ones."""
    return 512 if device.type == "cpu" else 4096


def body(model: Any) -> Any:
    """The model without its head. StageError where it has none."""
    for name in (model.base_model_prefix, "model"):  # Llama 4 names one that it does not have
        if name and hasattr(model, name):
            return getattr(model, name)
    raise StageError(f"{type(model).__name__} is not a body and a head: its logits cannot be made")


_CAPS = ("final_logit_softcapping", "logits_soft_cap")
_FACTORS = ("logit_scale", "logits_scaling", "lm_head_multiplier")
"""What logits are multiplied with after the head, by its names in a configuration (Cohere's, Granite's, Falcon-H1's).
HyperCLOVA X multiplies with what Granite divides by: of a value and its inverse, the one that fits is taken."""
_factors: WeakKeyDictionary[Any, float] = WeakKeyDictionary()
"""Models whose logits were found to be what `Head` makes, with their factor."""


class Head:
    """The output embedding, a factor, a soft-cap: logits of hidden states, one block of the vocabulary at a time."""

    def __init__(self, model: Any) -> None:
        self._module = model.get_output_embeddings()
        if self._module is None:
            raise StageError(f"{type(model).__name__} has no output embedding: its logits cannot be made")
        text = model.config.get_text_config()
        self._cap: float | None = next((cap for name in _CAPS if (cap := getattr(text, name, None))), None)
        # Any other module (a LoRA layer in adapter mode) is called for the whole vocabulary.
        self._plain = type(self._module) is torch.nn.Linear
        self._buffers: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}
        self._factor = _factors.get(model, 1.0)
        if model not in _factors:
            _factors[model] = self._factor = self._checked_factor(model)

    def _checked_factor(self, model: Any) -> float:
        """By one short forward pass: with it head(body(x)) is what the model itself returns, else it is refused."""
        ids = torch.arange(4, device=model.device)[None] % model.config.get_text_config().vocab_size
        with torch.no_grad():  # no inference mode: a training writes to the same buffers later
            own = model(input_ids=ids, use_cache=False).logits[0].float()
            hidden = body(model)(input_ids=ids, use_cache=False).last_hidden_state[0]
            ours = {}
            for self._factor in _possible_factors(model.config.get_text_config()):
                ours[self._factor] = self.logits(hidden)
        if own.shape != ours[1.0].shape:
            raise StageError(f"{type(model).__name__} returns other logits than its head: it cannot be scored")
        off = {factor: float((own - logits).abs().max()) for factor, logits in ours.items()}
        best = min(off, key=lambda factor: off[factor])
        tolerance = 1e-3 if next(self._module.parameters()).dtype == torch.float32 else 0.05
        scale = own.abs().max().clamp(min=1.0)
        if off[best] > tolerance * scale:  # not so of NaN: what reads such logits says what they are
            raise StageError(f"{type(model).__name__} changes its logits after the head (a scale, say): neither scores "
                             f"nor losses of it would be exact")  # fmt: skip
        return best

    @property
    def parameters(self) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """(weight, bias); None where only calling the module tells the logits: a LoRA layer, or ZeRO-3's parts."""
        at_hand = self._plain and not hasattr(self._module.weight, "ds_id")
        return (self._module.weight, self._module.bias) if at_hand else None

    def whole(self, hidden_PD: torch.Tensor) -> torch.Tensor:
        """fp32 logits over the whole vocabulary by calling the module: gradients flow through it."""
        logits_PV = self._factor * self._module(hidden_PD).float()
        return logits_PV if self._cap is None else self._cap * torch.tanh(logits_PV / self._cap)

    def logits(self, hidden_PD: torch.Tensor) -> torch.Tensor:
        """fp32 logits over the whole vocabulary: for few positions only."""
        return torch.cat([logits_PV.clone() for _, logits_PV in self._blocks(hidden_PD)], dim=1)

    def best(self, hidden_PD: torch.Tensor) -> torch.Tensor:
        """The most likely token per position, the first of equals: int64 [P]. StageError for logits not finite."""
        top_P = hidden_PD.new_full((len(hidden_PD),), -torch.inf, dtype=torch.float32)
        best_P = torch.zeros(len(hidden_PD), dtype=torch.int64, device=hidden_PD.device)
        for first, logits_PV in self._blocks(hidden_PD):
            block_P, where_P = logits_PV.max(dim=1)
            best_P = torch.where(block_P > top_P, where_P + first, best_P)
            top_P = torch.maximum(top_P, block_P)  # NaN where a block holds one
        if not torch.isfinite(top_P).all():
            raise StageError("logits are not finite: the weights hold such values, or overflow in this dtype")
        return best_P

    def score(
        self, hidden_PD: torch.Tensor, targets_T: torch.Tensor, at_T: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(log p(target), whether it is the most likely token) of each target at its position: fp32 [T] and bool [T].

        A position with several targets (one-token choices of a document) is multiplied with the head once.
        """
        logs_T = torch.empty(len(targets_T), dtype=torch.float32, device=hidden_PD.device)
        first_T = torch.empty(len(targets_T), dtype=torch.bool, device=hidden_PD.device)
        size = positions_at_once(hidden_PD.device)
        for start in range(0, len(hidden_PD), size):
            here = ((at_T >= start) & (at_T < start + size)).nonzero()[:, 0]
            targets, rows = targets_T[here], at_T[here] - start
            target, total_P, best_P = self._online(hidden_PD[start : start + size], targets, rows)
            logs_T[here], first_T[here] = target - total_P[rows], best_P[rows] == targets
        return logs_T, first_T

    def _online(
        self, hidden_PD: torch.Tensor, targets_T: torch.Tensor, rows_T: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(logit of each target in its row [T], log-sum-exp [P], most likely token [P]).

        Σ exp(x - m) is rescaled when a block raises m.
        """
        top_P = hidden_PD.new_full((len(hidden_PD),), -torch.inf, dtype=torch.float32)
        sum_P, best_P = torch.zeros_like(top_P), torch.zeros_like(top_P, dtype=torch.int64)
        target_T = torch.zeros(len(targets_T), dtype=torch.float32, device=hidden_PD.device)
        for first, logits_PV in self._blocks(hidden_PD):
            block_P, where_P = logits_PV.max(dim=1)
            best_P = torch.where(block_P > top_P, where_P + first, best_P)  # the first of equals, as argmax has it
            inside_T = targets_T - first
            found_T = logits_PV[rows_T, inside_T.clamp(0, logits_PV.shape[1] - 1)]
            target_T = torch.where((inside_T >= 0) & (inside_T < logits_PV.shape[1]), found_T, target_T)
            new_P = torch.maximum(top_P, block_P)
            sum_P = sum_P * (top_P - new_P).exp_() + logits_PV.sub_(new_P[:, None]).exp_().sum(dim=1)
            top_P = new_P
        return target_T, top_P + sum_P.log(), best_P

    def slopes(
        self, hidden_PD: torch.Tensor, targets_P: torch.Tensor
    ) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """∂(Σ −log p)/∂logits before factor, cap and bias: (positions, log p there, slope_PV), some at a time.

        The slopes have the weight's dtype; the next positions overwrite them. Needs `parameters`.
        """
        weight_VD, bias_V = self._module.weight, self._module.bias
        size = max(1, LOGITS // len(weight_VD))
        rows = max(1, CACHED // len(weight_VD)) if hidden_PD.device.type == "cpu" else size
        for start in range(0, len(hidden_PD), size):
            here = slice(start, min(start + size, len(hidden_PD)))
            slope_PV = self._buffer(weight_VD.dtype, here.stop - start, len(weight_VD))
            torch.mm(hidden_PD[here], weight_VD.T, out=slope_PV)
            if bias_V is not None:
                slope_PV += bias_V
            parts = zip(slope_PV.split(rows), targets_P[here].split(rows), strict=True)
            yield here, torch.cat([self._to_slopes(*part) for part in parts]), slope_PV

    def _to_slopes(self, logits_PV: torch.Tensor, targets_P: torch.Tensor) -> torch.Tensor:
        """Turns logits before factor and cap into slopes in place: log p of the targets, fp32 [P]."""
        slope_PV = logits_PV.float()  # itself, or a copy
        if self._factor != 1:
            slope_PV.mul_(self._factor)
        bend_PV = None
        if self._cap is not None:
            bend_PV = 1 - (self._capped(slope_PV) / self._cap) ** 2
        target_P = slope_PV.gather(1, targets_P[:, None])[:, 0]
        top_P = slope_PV.amax(dim=1)
        sum_P = slope_PV.sub_(top_P[:, None]).exp_().sum(dim=1)
        slope_PV.div_(sum_P[:, None])
        slope_PV[torch.arange(len(targets_P), device=targets_P.device), targets_P] -= 1
        if bend_PV is not None:
            slope_PV.mul_(bend_PV)
        if self._factor != 1:
            slope_PV.mul_(self._factor)
        if slope_PV is not logits_PV:
            logits_PV.copy_(slope_PV)
        return target_P - top_P - sum_P.log()

    def _blocks(self, hidden_PD: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """(first token, fp32 logits) of each block; the logits may be overwritten, and the next block reuses them."""
        if not self._plain:
            yield 0, self.whole(hidden_PD)
            return
        weight_VD, bias_V = self._module.weight, self._module.bias
        size = self._block(len(hidden_PD))
        for first in range(0, len(weight_VD), size):
            block_VD = weight_VD[first : first + size]
            product_PV = self._buffer(weight_VD.dtype, len(hidden_PD), len(block_VD))
            torch.mm(hidden_PD, block_VD.T, out=product_PV)
            if bias_V is not None:
                product_PV += bias_V[first : first + size]
            logits_PV = self._buffer(torch.float32, *product_PV.shape)
            logits_PV = logits_PV if logits_PV is product_PV else logits_PV.copy_(product_PV)
            yield first, self._capped(logits_PV if self._factor == 1 else logits_PV.mul_(self._factor))

    def _block(self, positions: int) -> int:
        """Tokens of a block of the vocabulary.

        On a device as many as `LOGITS` holds. A CPU's product in float32 is 1.3 times as fast in small blocks (15
        positions, 262k entries: 139 against 184 ms); in bfloat16 they are alike.
        """
        if self._module.weight.device.type == "cpu":
            return VOCABULARY
        return max(VOCABULARY, LOGITS // max(1, positions))

    def _buffer(self, dtype: torch.dtype, rows: int, columns: int) -> torch.Tensor:
        device = self._module.weight.device
        held = self._buffers.get((dtype, device))
        if held is None or held.numel() < rows * columns:
            held = self._buffers[dtype, device] = torch.empty(rows * columns, dtype=dtype, device=device)
        return held[: rows * columns].view(rows, columns)

    def _capped(self, logits_PV: torch.Tensor) -> torch.Tensor:
        if self._cap is None:
            return logits_PV
        return logits_PV.div_(self._cap).tanh_().mul_(self._cap)


def _possible_factors(config: Any) -> list[float]:
    """1, and what a configuration's numbers may mean for the logits."""
    values = [getattr(config, name, None) for name in _FACTORS]  # MPT may have a word there
    numbers = [float(value) for value in values if isinstance(value, int | float) and value]
    return list(dict.fromkeys([1.0, *(factor for value in numbers for factor in (value, 1 / value))]))
