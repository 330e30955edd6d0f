"""How likely a model finds continuations: log p(continuation | context) as lm-eval's `HFLM` gives it, and faster.

Head and log-sum-exp run only where a continuation is read; requests whose input is another's, or begins another's, are
read from its forward pass (the one-token choices of a document share a row).

Shape suffixes: B rows of a batch, S its longest input, D hidden size, P scored positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from portllm.errors import StageError
from portllm.work.head import Head, body
from portllm.work.requests import RequestSet


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
