"""How likely a model finds continuations: log p(continuation | context) as lm-eval's `HFLM` gives it, and faster.

Head and log-sum-exp run only where a continuation is read, over blocks of the vocabulary; requests whose input is
another's, or begins another's, are read from its forward pass (the one-token choices of a document share a row).

Shape suffixes: B rows of a batch, S its longest input, D hidden size, P scored positions, V a block of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import numpy as np
import torch

from portllm.errors import StageError
from portllm.work.requests import RequestSet

POSITIONS = 512
"""Positions per product with the head: 256-512 ran fastest on a CPU."""
VOCABULARY = 2048
"""Tokens per block of the vocabulary: the fastest of 2k to 16k at 32k and 262k entries (1.1 to 1.4 times the product
and log-softmax of all logits at once, whose allocation is what costs)."""


@dataclass(frozen=True)
class Scores:
    """One value per request."""

    loglikelihoods: np.ndarray
    """float64 [R]."""
    greedy: np.ndarray
    """bool [R]: every token of the continuation is the most likely one."""
    truncated: int
    """Requests whose context was cut from the left to fit the model's window."""


@dataclass
class Row:
    """One input and what is read from its forward pass."""

    ids: np.ndarray
    reads: list[tuple[int, int, np.ndarray]] = field(default_factory=list)
    """(request, first position, target tokens)."""


def loglikelihoods(model: Any, requests: RequestSet, budget: int) -> Scores:
    """Scores every request; a batch holds at most `budget` tokens, padding included.

    Raises StageError for an architecture whose logits are more than head(body(x)), and for scores that are not finite.
    """
    head = Head(model)
    rows, truncated = plan_rows(requests, max_length(model, requests))
    scores = np.zeros(len(requests))
    greedy = np.ones(len(requests), dtype=bool)
    with torch.inference_mode():
        for batch in batches(rows, budget):
            _score(model, head, batch, scores, greedy)
    if not np.isfinite(scores).all():
        worst = int(np.argmin(np.isfinite(scores)))
        raise StageError(f"the score of document {requests.doc_ids[requests.documents[worst]]} is {scores[worst]}: the "
                         f"weights hold values that are not finite, or overflow in this dtype")  # fmt: skip
    return Scores(scores, greedy, truncated)


def max_length(model: Any, requests: RequestSet) -> int:
    """The model's window in tokens, as lm-eval finds it."""
    from lm_eval.models.utils import resolve_max_length

    return int(resolve_max_length(model.config, None, default=requests.meta["model_max_length"]))


def plan_rows(requests: RequestSet, window: int) -> tuple[list[Row], int]:
    """The distinct inputs, longest first, none a beginning of another; and how many requests were cut."""
    keyed: list[tuple[bytes, int, np.ndarray, int]] = []
    truncated = 0
    for request in range(len(requests)):
        ids = requests.ids(request)
        cut = max(0, len(ids) - (window + 1))
        start = int(requests.answers[request]) - cut
        if start < 1:
            raise StageError(f"request {request}: its continuation exceeds the model's window of {window} tokens")
        truncated += cut > 0
        # Big-endian bytes sort as the tokens do: an input comes right before those it begins.
        keyed.append((ids[cut:-1].astype(">u4").tobytes(), request, ids[cut:], start))
    rows: list[Row] = []
    last = b""
    for key, request, ids, start in sorted(keyed, key=lambda k: k[:2], reverse=True):
        if not rows or not last.startswith(key):
            rows.append(Row(ids[:-1]))
            last = key
        rows[-1].reads.append((request, start - 1, ids[start:]))
    return sorted(rows, key=lambda row: -len(row.ids)), truncated


def batches(rows: Sequence[Row], budget: int) -> Iterator[Sequence[Row]]:
    """Rows, longest first, in batches of at most `budget` tokens with their padding, and at least one row."""
    start = 0
    while start < len(rows):
        count = max(1, budget // len(rows[start].ids))
        yield rows[start : start + count]
        start += count


def _score(model: Any, head: Head, batch: Sequence[Row], scores: np.ndarray, greedy: np.ndarray) -> None:
    reads = [(b, *read) for b, row in enumerate(batch) for read in row.reads]
    owner_P = np.repeat([r[1] for r in reads], [len(r[3]) for r in reads])
    row_P = np.repeat([r[0] for r in reads], [len(r[3]) for r in reads])
    position_P = np.concatenate([np.arange(first, first + len(targets)) for _, _, first, targets in reads])
    targets_P = torch.from_numpy(np.concatenate([r[3] for r in reads])).to(model.device)
    hidden_BSD = body(model)(input_ids=_padded(batch).to(model.device), use_cache=False).last_hidden_state
    hidden_PD = hidden_BSD[torch.from_numpy(row_P).to(model.device), torch.from_numpy(position_P).to(model.device)]
    logs_P, best_P = head.score(hidden_PD, targets_P)
    np.add.at(scores, owner_P, logs_P.double().cpu().numpy())
    np.logical_and.at(greedy, owner_P, best_P.cpu().numpy())


def _padded(batch: Sequence[Row]) -> torch.Tensor:
    """Padded on the right. No mask is needed: nothing that is read attends to what comes after it, and without a mask
    the attention kernels take their faster causal path (`HFLM` passes none either)."""
    ids_BS = np.zeros((len(batch), len(batch[0].ids)), dtype=np.int64)
    for b, row in enumerate(batch):
        ids_BS[b, : len(row.ids)] = row.ids
    return torch.from_numpy(ids_BS)


def body(model: Any) -> Any:
    """The model without its head."""
    return getattr(model, model.base_model_prefix)


_checked: WeakSet[Any] = WeakSet()
"""Models whose logits were found to be what `Head` makes."""


class Head:
    """The output embedding with its soft-cap: logits of hidden states, one block of the vocabulary at a time."""

    def __init__(self, model: Any) -> None:
        self._module = model.get_output_embeddings()
        if self._module is None or not hasattr(model, model.base_model_prefix or " "):
            raise StageError(f"{type(model).__name__} is not a body and a head: it cannot be scored")
        self._cap: float | None = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        # Any other module (a LoRA layer in adapter mode) is called for the whole vocabulary.
        self._plain = type(self._module) is torch.nn.Linear
        self._buffers: dict[torch.dtype, torch.Tensor] = {}
        if model not in _checked:
            self._check(model)
            _checked.add(model)

    def _check(self, model: Any) -> None:
        """One short forward pass: head(body(x)) is what the model itself returns, or the model is refused."""
        ids = torch.arange(4, device=model.device)[None] % model.config.get_text_config().vocab_size
        with torch.inference_mode():
            own = model(input_ids=ids, use_cache=False).logits[0].float()
            ours = self.logits(body(model)(input_ids=ids, use_cache=False).last_hidden_state[0])
        tolerance = 1e-3 if next(self._module.parameters()).dtype == torch.float32 else 0.05
        scale = own.abs().max().clamp(min=1.0)
        if own.shape != ours.shape or (own - ours).abs().max() > tolerance * scale:
            raise StageError(f"{type(model).__name__} changes its logits after the head (a scale, say): it cannot be "
                             f"scored exactly")  # fmt: skip

    def logits(self, hidden_PD: torch.Tensor) -> torch.Tensor:
        """fp32 logits over the whole vocabulary: for few positions only."""
        return torch.cat([logits_PV.clone() for _, logits_PV in self._blocks(hidden_PD)], dim=1)

    def best(self, hidden_PD: torch.Tensor) -> torch.Tensor:
        """The most likely token per position, the first of equals: int64 [P]."""
        top_P = hidden_PD.new_full((len(hidden_PD),), -torch.inf, dtype=torch.float32)
        best_P = torch.zeros(len(hidden_PD), dtype=torch.int64, device=hidden_PD.device)
        for first, logits_PV in self._blocks(hidden_PD):
            block_P, where_P = logits_PV.max(dim=1)
            best_P = torch.where(block_P > top_P, where_P + first, best_P)
            top_P = torch.maximum(top_P, block_P)
        return best_P

    def score(self, hidden_PD: torch.Tensor, targets_P: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(log p(target), whether it is the most likely token) per position: fp32 [P] and bool [P]."""
        parts = [self._score(h, t) for h, t in zip(hidden_PD.split(POSITIONS), targets_P.split(POSITIONS), strict=True)]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    def _score(self, hidden_PD: torch.Tensor, targets_P: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Online log-sum-exp: Σ exp(x - m) is rescaled whenever a block raises the maximum m."""
        top_P = hidden_PD.new_full((len(hidden_PD),), -torch.inf, dtype=torch.float32)
        sum_P, target_P, best_P = torch.zeros_like(top_P), torch.zeros_like(top_P), torch.zeros_like(targets_P)
        for first, logits_PV in self._blocks(hidden_PD):
            block_P, where_P = logits_PV.max(dim=1)
            best_P = torch.where(block_P > top_P, where_P + first, best_P)  # the first of equals, as argmax has it
            inside_P = targets_P - first
            found_P = logits_PV.gather(1, inside_P.clamp(0, logits_PV.shape[1] - 1)[:, None])[:, 0]
            target_P = torch.where((inside_P >= 0) & (inside_P < logits_PV.shape[1]), found_P, target_P)
            new_P = torch.maximum(top_P, block_P)
            sum_P = sum_P * (top_P - new_P).exp_() + logits_PV.sub_(new_P[:, None]).exp_().sum(dim=1)
            top_P = new_P
        return target_P - top_P - sum_P.log(), best_P == targets_P

    def _blocks(self, hidden_PD: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """(first token, fp32 logits) of each block; the logits may be overwritten, and the next block reuses them."""
        if not self._plain:
            yield 0, self._capped(self._module(hidden_PD).float())
            return
        weight_VD, bias_V = self._module.weight, self._module.bias
        for first in range(0, len(weight_VD), VOCABULARY):
            block_VD = weight_VD[first : first + VOCABULARY]
            product_PV = self._buffer(weight_VD.dtype, len(hidden_PD), len(block_VD))
            torch.mm(hidden_PD, block_VD.T, out=product_PV)
            if bias_V is not None:
                product_PV += bias_V[first : first + VOCABULARY]
            logits_PV = self._buffer(torch.float32, *product_PV.shape)
            yield first, self._capped(logits_PV if logits_PV is product_PV else logits_PV.copy_(product_PV))

    def _buffer(self, dtype: torch.dtype, rows: int, columns: int) -> torch.Tensor:
        held = self._buffers.get(dtype)
        if held is None or held.numel() < rows * columns:
            held = self._buffers[dtype] = torch.empty(rows * columns, dtype=dtype, device=self._module.weight.device)
        return held[: rows * columns].view(rows, columns)

    def _capped(self, logits_PV: torch.Tensor) -> torch.Tensor:
        if self._cap is None:
            return logits_PV
        return logits_PV.div_(self._cap).tanh_().mul_(self._cap)
