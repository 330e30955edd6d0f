"""How likely a model finds continuations: log p(continuation | context) as lm-eval's `HFLM` gives it, and faster.

Head and log-sum-exp run only where a continuation is read. Inputs that are another's, or begin another's, are read from
its forward pass (the one-token choices of a document are one input). Inputs that only begin alike are a family: their
stem is forwarded once, each branch goes on from its keys and values; a stem's own beginning that all families share
(a fixed few-shot header) is forwarded once for all.

    requests → spans (cut to the window) → rows (distinct inputs) → families → batches → stems, then branches

Shape suffixes: B rows of a batch, S its longest input, D hidden size, P read positions, T their targets.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import torch

from portllm.errors import StageError
from portllm.work.context import Progress, unheard
from portllm.work.halving import fits, in_halves
from portllm.work.head import Head, body, positions_at_once
from portllm.work.kv_cache import attention_window, keeps_all
from portllm.work.last_layer import LastLayer
from portllm.work.requests import RequestSet

WORTH = 0.2
"""Share of the tokens that a family must save: below it a second forward pass costs more than it saves."""
HEADER = 32
"""Tokens that all families must share for a pass of their own."""
PASS = 128
"""Tokens that a forward pass costs besides its own: more padding than that is worth another pass."""

HELD = 16
"""Token budgets that keys and values may fill: rows × columns of a pass that goes on from a cache. Without it a budget
of 2,048 tokens held 32,000 behind 8 examples of SST-2 (1.2 GB for Gemma 3 270M in float32), and more behind more."""

Read = tuple[int, int, np.ndarray]
"""(request, first position, target tokens): the target after position p is read at p."""


@dataclass(frozen=True)
class Scores:
    """One value per request."""

    loglikelihoods: np.ndarray
    """float64 [R]."""
    greedy: np.ndarray
    """bool [R]: every token of the continuation is the most likely one."""
    truncated: int
    """Requests whose context was cut from the left to fit the model's window."""
    halved: int = 0
    """What ran out of memory and was done in smaller parts: batches, the head's products, a header's pass."""


@dataclass
class Row:
    """One input and what is read from its forward pass."""

    ids: np.ndarray
    reads: list[Read] = field(default_factory=list)


@dataclass
class Family:
    """Inputs that begin alike."""

    stem: Row
    branches: list[Row] = field(default_factory=list)
    """What each goes on with; positions of its reads count from there."""


def loglikelihoods(model: Any, requests: RequestSet, budget: int, progress: Progress = unheard) -> Scores:
    """Scores every request; a forward pass has at most `budget` tokens, padding included.

    `progress` hears after each batch how many requests are done, of how many. Raises StageError for an architecture
    whose logits are more than head(body(x)), and for scores that are not finite.
    """
    turn = rope_turn(model)
    rows, truncated = plan_rows(requests, max_length(model, requests), turn)
    long = sum(turn is not None and len(row.ids) > turn for row in rows)
    shares = keeps_all(model) and not long
    families = plan_families(rows, requests, shares)
    scorer = _Scorer(model, len(requests))
    with torch.inference_mode():
        header = scorer.forward_header(shared_header(families if shares else [], attention_window(model)))
        done = np.cumsum(ended(families))
        lengths = [len(family.stem.ids) - header for family in families]
        for begin, end in ((0, long), (long, len(lengths))):  # longest first, and none of one side beside the other's
            for batch in batches(lengths[begin:end], budget, behind=header):
                scorer.score(families[begin + batch.start : begin + batch.stop], budget)
                progress(int(done[begin + batch.stop - 1]), len(requests))
        scorer.finish()
    if not np.isfinite(scorer.scores).all():
        worst = int(np.argmin(np.isfinite(scorer.scores)))
        raise StageError(f"the score of document {requests.doc_ids[requests.documents[worst]]} is "
                         f"{scorer.scores[worst]}: the weights hold values that are not finite, or overflow in this "
                         f"dtype")  # fmt: skip
    return Scores(scorer.scores, scorer.greedy, truncated, scorer.halved)


def max_length(model: Any, requests: RequestSet) -> int:
    """The model's window in tokens, as lm-eval finds it."""
    from lm_eval.models.utils import resolve_max_length

    return int(resolve_max_length(model.config, None, default=requests.meta["model_max_length"]))


def rope_turn(model: Any) -> int | None:
    """The length beyond which a model turns all its positions otherwise (LongRoPE: Phi-3's 128k models): the longest
    input of a forward pass decides for all of them."""
    given = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    kinds = [given, *(value for value in given.values() if isinstance(value, dict))]
    turns = [kind["original_max_position_embeddings"] for kind in kinds if kind.get("rope_type") == "longrope"]
    return min(turns, default=None)


# ------------------------------------------------------------------------------------------------------------- the plan


def spans(requests: RequestSet, window: int) -> Iterator[tuple[int, np.ndarray, int]]:
    """(request, token ids, index of the first one scored), each no longer than window + 1 tokens.

    A text of a rolling task is scored window by window, each after one token of context; any other request is cut from
    the left.
    """
    rolling = requests.meta.get("output_type") == "loglikelihood_rolling"
    for request in range(len(requests)):
        ids, start = requests.ids(request), int(requests.answers[request])
        if rolling:
            yield from ((request, part, first) for part, first in _windows(ids, window))
            continue
        cut = max(0, len(ids) - (window + 1))
        if start - cut < 1:
            raise StageError(f"request {request}: its continuation exceeds the model's window of {window} tokens")
        yield request, ids[cut:], start - cut


def _windows(ids: np.ndarray, window: int) -> Iterator[tuple[np.ndarray, int]]:
    """lm-eval's own windows over a text; `ids` begins with the token that stands before it."""
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    for pair in get_rolling_token_windows(ids[1:].tolist(), int(ids[0]), window, context_len=1):
        context, predicted = make_disjoint_window(pair)
        yield np.asarray([*context, *predicted]), len(context)


def plan_rows(requests: RequestSet, window: int, turn: int | None = None) -> tuple[list[Row], int]:
    """The distinct inputs, none a beginning of another on the same side of `turn`, and how many requests were cut."""
    keyed: list[tuple[bytes, int, np.ndarray, int]] = []
    truncated = 0
    for request, ids, start in spans(requests, window):
        truncated += int(start < requests.answers[request])
        # Big-endian bytes sort as the tokens do: an input comes right before those it begins.
        keyed.append((ids[:-1].astype(">u4").tobytes(), request, ids, start))
    rows: list[Row] = []
    last = b""
    for key, request, ids, start in sorted(keyed, key=lambda k: k[:2], reverse=True):
        apart = turn is not None and rows and (len(rows[-1].ids) > turn) != (len(ids) - 1 > turn)
        if not rows or apart or not last.startswith(key):
            rows.append(Row(ids[:-1]))
            last = key
        rows[-1].reads.append((request, start - 1, ids[start:]))
    return rows, truncated


def plan_families(rows: Sequence[Row], requests: RequestSet, shares: bool = True) -> list[Family]:
    """The rows of each document as one family where that saves enough, else each by itself; longest stem first.

    `shares`: whether the model can go on from another input's pass at all.
    """
    document = {id(row): int(requests.documents[row.reads[0][0]]) for row in rows}
    ordered = sorted(rows, key=lambda row: document[id(row)])
    families: list[Family] = []
    for _, members in groupby(ordered, key=lambda row: document[id(row)]):
        alike = list(members)
        families += _family(alike) if shares else map(Family, alike)
    return sorted(families, key=lambda family: -len(family.stem.ids))


def _family(rows: Sequence[Row]) -> Iterator[Family]:
    shared = common_length([row.ids for row in rows])
    if (len(rows) - 1) * shared < WORTH * sum(len(row.ids) for row in rows):
        yield from (Family(row) for row in rows)
        return
    family = Family(Row(rows[0].ids[:shared]))
    for row in rows:
        first, then = _split(row, shared)
        family.stem.reads += first.reads
        family.branches.append(then)
    yield family


def _split(row: Row, at: int) -> tuple[Row, Row]:
    """A row as its first `at` tokens and the rest, every read where its position went."""
    first, then = Row(row.ids[:at]), Row(row.ids[at:])
    for request, position, targets in row.reads:
        count = min(max(at - position, 0), len(targets))
        if count:
            first.reads.append((request, position, targets[:count]))
        if count < len(targets):
            then.reads.append((request, position + count - at, targets[count:]))
    return first, then


def common_length(inputs: Sequence[np.ndarray]) -> int:
    """How many tokens all inputs begin with."""
    length = min(len(ids) for ids in inputs)
    stacked = np.stack([ids[:length] for ids in inputs])
    differs = (stacked != stacked[0]).any(axis=0)
    return int(differs.argmax()) if differs.any() else length


def shared_header(families: Sequence[Family], window: int | None) -> np.ndarray:
    """What all stems begin with, where it is worth a pass of its own: nothing is read from it.

    The padding of shorter stems lies between the header and them, so that a pass may have as many columns as the
    longest stem and the longest branch of another: a sliding window that does not see all must not count them.
    """
    nothing = np.zeros(0, dtype=np.int64)
    stems, branches = [f.stem.ids for f in families], [branch.ids for f in families for branch in f.branches]
    columns = sum(max(map(len, inputs), default=0) for inputs in (stems, branches))
    if len(families) < 2 or (window is not None and window < columns):
        return nothing
    reads = min((read[1] for family in families for read in family.stem.reads), default=len(families[-1].stem.ids))
    length = min(common_length(stems), reads, len(families[-1].stem.ids) - 1)
    return families[0].stem.ids[:length] if length >= HEADER else nothing


def ended(families: Sequence[Family]) -> np.ndarray:
    """int64 [families]: requests of which nothing is left to read after each; a long text lies in several."""
    last = {
        request: number
        for number, family in enumerate(families)
        for row in (family.stem, *family.branches)
        for request, *_ in row.reads
    }
    return np.bincount(list(last.values()), minlength=len(families))


def batches(lengths: Sequence[int], budget: int, passes: int = 1, behind: int = 0) -> Iterator[slice]:
    """Rows, longest first, in batches of at most `budget` tokens with their padding, and at least one row.

    Each row goes on from `behind` columns of a cache, and all of that is at most HELD · `budget` columns.
    The cheapest cut of all, Σ (rows × longest + PASS × `passes`), by dynamic programming from first to last.
    """
    count = len(lengths)
    cost, begin = np.full(count + 1, np.inf), np.zeros(count + 1, dtype=np.int64)
    cost[0] = 0
    for start, longest in enumerate(lengths):
        most = min(budget // longest, HELD * budget // (behind + longest))
        rows = np.arange(1, min(max(1, most), count - start) + 1)
        through, ends = cost[start] + rows * longest + PASS * passes, start + rows
        better = through < cost[ends]
        cost[ends[better]], begin[ends[better]] = through[better], start
    cuts = [count]
    while cuts[-1]:
        cuts.append(int(begin[cuts[-1]]))
    yield from (slice(*pair) for pair in pairwise(reversed(cuts)))


# ------------------------------------------------------------------------------------------------------ forward passes


class _Scorer:
    """Forward passes, and the scores that what is read of them adds up to."""

    def __init__(self, model: Any, requests: int) -> None:
        self.model, self.head, self.last_layer = model, Head(model), LastLayer(model)
        self.scores = np.zeros(requests)
        self.greedy = np.ones(requests, dtype=bool)
        self.halved = 0
        self._header = 0
        self._cache: Any = None
        """Keys and values of the header, one row."""
        self._read: list[tuple[torch.Tensor, Sequence[Read], np.ndarray]] = []
        """Per pass (hidden states at the positions read [P, D], what is read, position of each target [T])."""

    def forward_header(self, ids: np.ndarray) -> int:
        """Keeps the header's keys and values for all that follows: its length; 0 where memory does not hold them."""
        if not len(ids):
            return 0
        cache, ids_BS = self._new_cache(), torch.from_numpy(ids.astype(np.int64))[None]
        if fits(lambda: self._forward(ids_BS, [], past_key_values=cache, use_cache=True)):
            self._cache, self._header = cache, len(ids)
        else:
            self.halved += 1
        return self._header

    def score(self, batch: Sequence[Family], budget: int) -> None:
        """Forwards a batch; where it does not fit into memory, its halves."""
        self.halved += in_halves(batch, lambda part: self._undone(part, budget))
        if sum(len(hidden_PD) for hidden_PD, _, _ in self._read) >= positions_at_once(self.model.device):
            self.finish()

    def _undone(self, batch: Sequence[Family], budget: int) -> None:
        """Forwards a batch, or leaves everything as it was."""
        before = len(self._read)
        try:
            self._score(batch, budget)
        except BaseException:
            del self._read[before:]
            raise

    def finish(self) -> None:
        """Scores what was read of the passes so far; the head takes its time for a few positions, too."""
        if not self._read:
            return
        begins = np.cumsum([0, *(len(hidden_PD) for hidden_PD, _, _ in self._read)])
        reads = [read for _, reads, _ in self._read for read in reads]
        at_T = _joined([begin + at_T for begin, (_, _, at_T) in zip(begins, self._read, strict=False)])
        targets_T = _joined([targets for *_, targets in reads])
        logs_T, best_T = np.empty(len(at_T)), np.empty(len(at_T), dtype=bool)

        def work(positions: Sequence[int]) -> None:
            here = (at_T >= positions[0]) & (at_T <= positions[-1])
            hidden_PD = self._hidden(begins, positions)
            targets, places = (
                torch.from_numpy(array[here]).to(hidden_PD.device) for array in (targets_T, at_T - positions[0])
            )
            logs, best = self.head.score(hidden_PD, targets, places)
            logs_T[here], best_T[here] = logs.cpu().numpy(), best.cpu().numpy()

        self.halved += in_halves(range(begins[-1]), work)
        owner_T = np.repeat([request for request, *_ in reads], [len(targets) for *_, targets in reads])
        np.add.at(self.scores, owner_T, logs_T)
        np.logical_and.at(self.greedy, owner_T, best_T)
        self._read = []

    def _hidden(self, begins: np.ndarray, positions: Sequence[int]) -> torch.Tensor:
        """Hidden states at consecutive positions, counted through the passes so far: [P, D]."""
        first, end = positions[0], positions[-1] + 1
        return torch.cat([
            hidden_PD[max(first - begin, 0) : max(end - begin, 0)]
            for begin, (hidden_PD, _, _) in zip(begins, self._read, strict=False)
        ])  # fmt: skip

    def _score(self, batch: Sequence[Family], budget: int) -> None:
        stems = [family.stem for family in batch]
        if self._cache is None and not any(family.branches for family in batch):
            # No mask is needed: nothing that is read attends to the padding after it, and without a mask the attention
            # kernels take their faster causal path (`HFLM` passes none either).
            ids_BS = padded([stem.ids for stem in stems])
            self._forward(ids_BS, _reads(stems, [0] * len(stems), ids_BS.shape[1]), use_cache=False)
            return
        cache = self._new_cache() if self._cache is None else _rows_of(self._cache, [0] * len(stems))
        rests = [_split(stem, self._header)[1] for stem in stems]
        # Padded on the left: what goes on from a stem follows it without a gap, as a sliding window needs it.
        shifts = [max(len(rest.ids) for rest in rests) - len(rest.ids) for rest in rests]
        mask_BS = np.ones((len(rests), self._header + shifts[0] + len(rests[0].ids)), dtype=np.int64)
        for b, shift in enumerate(shifts):
            mask_BS[b, self._header : self._header + shift] = 0
        ids_BS = padded([rest.ids for rest in rests], left=True)
        self._go_on(ids_BS, _reads(rests, shifts, ids_BS.shape[1]), mask_BS, cache)
        self._branches(batch, mask_BS, cache, budget)

    def _branches(self, batch: Sequence[Family], mask_BS: np.ndarray, cache: Any, budget: int) -> None:
        pairs = [(b, row) for b, family in enumerate(batch) for row in family.branches if len(row.ids)]
        pairs.sort(key=lambda pair: -len(pair[1].ids))
        for part in batches([len(row.ids) for _, row in pairs], budget, behind=mask_BS.shape[1]):
            owners, rows = [b for b, _ in pairs[part]], [row for _, row in pairs[part]]
            ids_BS = padded([row.ids for row in rows])
            own_BS = padded([np.ones_like(row.ids) for row in rows]).numpy()  # padding takes no position of its own
            mask = np.concatenate([mask_BS[owners], own_BS], axis=1)
            self._go_on(ids_BS, _reads(rows, [0] * len(rows), ids_BS.shape[1]), mask, _rows_of(cache, owners))

    def _go_on(self, ids_BS: torch.Tensor, reads: Sequence[Read], mask_BS: np.ndarray, cache: Any) -> None:
        """Forwards tokens that go on from a cache."""
        mask = torch.from_numpy(mask_BS).to(self.model.device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids_BS.shape[1] :]
        self._forward(ids_BS, reads, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)

    def _forward(self, ids_BS: torch.Tensor, reads: Sequence[Read], **how: Any) -> None:
        """One forward pass, and what is read from it: each read's position is b · S + s."""
        device = self.model.device
        places, at_T = np.unique(_joined([np.arange(p, p + len(t)) for _, p, t in reads]), return_inverse=True)
        read_P = torch.from_numpy(places).to(device)
        with self.last_layer.reading(read_P, ids_BS.numel()):
            hidden_BSD = body(self.model)(input_ids=ids_BS.to(device), **how).last_hidden_state
        if reads:
            self._read.append((hidden_BSD.flatten(0, 1)[read_P], reads, at_T))

    def _new_cache(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)


def _reads(rows: Sequence[Row], shifts: Sequence[int], length: int) -> list[Read]:
    """What is read from the rows of a pass [B, `length`], each shifted to the right: positions are b · S + s."""
    return [
        (request, b * length + shifts[b] + first, targets)
        for b, row in enumerate(rows)
        for request, first, targets in row.reads
    ]


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """int64, also of none."""
    return np.concatenate([np.zeros(0, dtype=np.int64), *arrays], dtype=np.int64)


def _rows_of(cache: Any, rows: Iterable[int]) -> Any:
    """A copy of a cache that holds these rows of it: a forward pass writes to the cache it is given."""
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]
    chosen.reorder_cache(torch.tensor(list(rows)))
    return chosen


def padded(inputs: Sequence[np.ndarray], left: bool = False) -> torch.Tensor:
    """int64 [B, S], zeros after the inputs, or before them."""
    longest = max(len(ids) for ids in inputs)
    ids_BS = np.zeros((len(inputs), longest), dtype=np.int64)
    for b, ids in enumerate(inputs):
        ids_BS[b, longest - len(ids) if left else 0 :][: len(ids)] = ids
    return torch.from_numpy(ids_BS)
