"""Which sequences make which global batch, and how one rank reads its share: pure functions of recipe and seed.

The order of a training: sequence ids → global batches (fixed by recipe and seed) → a rank's share (ids[rank::world]) →
micro-batches → arrays. Only the first arrow may change a number; the others move rounding only.

A document that is packed into a row with others is read as if it stood there alone: its positions start at 0, attention
stays inside it (`work/packing.py` says of which models this holds), and its first token is no target, since nothing
stands before it.

Shape suffixes: B sequences, T tokens of the longest, padded, N positions with a target.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil
from pathlib import Path

import numpy as np

from portllm.errors import StageError

Batch = list[int]
"""Ids of sequences."""

PAD_MULTIPLE = 8
"""Lengths are rounded up to it: each new shape costs the CPU anew (0.2 s in bf16 with Gemma 3 270M, a step takes 1 s).
Of SST-2's padded tokens 87 % are its own with 6 shapes; of multiples of 16 74 % with 4, of 4 93 % with 11."""
WINDOW = 50
"""Batches within which examples are sorted by length."""


@dataclass(frozen=True)
class Sequences:
    """Token sequences, as spans of one flat (memory-mapped) array."""

    tokens: "np.ndarray | Joined"
    starts: np.ndarray
    """int64 [n]: a sequence's first token."""
    ends: np.ndarray
    answers: np.ndarray
    """int64 [n]: index within the sequence of its first target, at least 1: nothing predicts a first token."""
    offsets: np.ndarray
    """int64 [documents + 1]: where documents begin in `tokens`."""
    documents: "np.ndarray | Named"
    """int64 or text [documents]: their names in logs and errors."""
    limit: int | None = None
    """Longest sequence the model reads; padding does not pass it."""
    left_out: int = 0
    """Sequences without a target: they are not among these."""

    def __len__(self) -> int:
        return len(self.starts)

    @cached_property
    def lengths(self) -> np.ndarray:
        return self.ends - self.starts

    @cached_property
    def targets(self) -> np.ndarray:
        """Number of targets of each sequence."""
        begun = np.searchsorted(self.offsets, self.ends) - np.searchsorted(self.offsets, self.starts + self.answers)
        return self.lengths - self.answers - begun

    @cached_property
    def joins(self) -> bool:
        """Whether any sequence holds more than one document."""
        return bool((np.searchsorted(self.offsets, self.ends) > np.searchsorted(self.offsets, self.starts + 1)).any())

    def boundaries(self, i: int) -> np.ndarray:
        """int64: where in a sequence a document begins, the one it begins with left out."""
        first, last = np.searchsorted(self.offsets, (self.starts[i] + 1, self.ends[i]))
        return np.asarray(self.offsets[first:last] - self.starts[i])

    def documents_of(self, ids: Sequence[int]) -> list[int | str]:
        """Names of the documents that the sequences touch, in order of the ids."""
        return [name for i in ids for name in self.documents[self._touched(i)].tolist()]

    def _touched(self, i: int) -> slice:
        first = int(np.searchsorted(self.offsets, self.starts[i], side="right")) - 1
        return slice(first, int(np.searchsorted(self.offsets, self.ends[i], side="left")))


def packed(corpus: Path, start: int, tokens: int, length: int) -> Sequences:
    """Tokens [start, start + tokens) of a corpus as blocks of `length`; what is left over at the end is dropped.

    Every token is a target but a block's first and a document's first. Raises StageError when the corpus is too short,
    or has no target.
    """
    flat, offsets = np.load(corpus / "tokens.npy", mmap_mode="r"), np.load(corpus / "offsets.npy")
    rows = np.load(corpus / "rows.npy", mmap_mode="r")
    if start + tokens > len(flat):
        raise StageError(
            f"the corpus has {len(flat):,} tokens, and tokens {start:,} to {start + tokens:,} are asked for: "
            f"ask for fewer (`tokens`, or `steps` of the lineage), or give a longer corpus"
        )
    if tokens < length or length < 2:
        raise StageError(f"{tokens:,} tokens do not fill one sequence of {length} tokens (`sequence_length`)")
    starts = start + length * np.arange(tokens // length, dtype=np.int64)
    return with_targets(Sequences(flat, starts, starts + length, np.ones_like(starts), offsets, rows, length))


def with_targets(data: Sequences) -> Sequences:
    """The sequences that have a target: the mean loss of a batch of others would be 0 / 0."""
    kept = data.targets > 0
    if not kept.any():
        raise StageError(
            f"none of {len(data):,} sequences has a token to predict: a document's first token is none, so give longer "
            f"documents (or raise `sequence_length`)"
        )
    return replace(
        data, starts=data.starts[kept], ends=data.ends[kept], answers=data.answers[kept], left_out=int((~kept).sum())
    )


@dataclass(frozen=True)
class Joined:
    """Flat (memory-mapped) arrays as if they were one; a span lies within one of them."""

    parts: Sequence[np.ndarray]

    @cached_property
    def begins(self) -> np.ndarray:
        """int64 [parts + 1]: where each part begins, and where the last ends."""
        return np.cumsum([0, *map(len, self.parts)])

    def find(self, span: slice) -> tuple[int, np.ndarray]:
        """The number of the part that a span lies in, and what is there."""
        part = int(np.searchsorted(self.begins, span.start, side="right")) - 1
        begin = int(self.begins[part])
        return part, self.parts[part][span.start - begin : span.stop - begin]

    def __getitem__(self, span: slice) -> np.ndarray:
        return self.find(span)[1]


@dataclass(frozen=True)
class Named:
    """The documents of several corpora as "part:row"; a name is made where it is asked for."""

    names: Sequence[str]
    rows: Joined

    def __getitem__(self, span: slice) -> np.ndarray:
        part, rows = self.rows.find(span)
        return np.array([f"{self.names[part]}:{row}" for row in rows])


def mixed(parts: Mapping[str, Sequences]) -> Sequences:
    """The sequences of several corpora as those of one; a document is named "part:row"."""
    flat = Joined([np.asarray(part.tokens) for part in parts.values()])
    at = list(zip(parts.values(), flat.begins[:-1], strict=True))
    return Sequences(
        flat,
        np.concatenate([part.starts + begin for part, begin in at]),
        np.concatenate([part.ends + begin for part, begin in at]),
        np.concatenate([part.answers for part in parts.values()]),
        np.concatenate([part.offsets[:-1] + begin for part, begin in at] + [flat.begins[-1:]]),
        Named(list(parts), Joined([np.asarray(part.documents) for part in parts.values()])),
        next(iter(parts.values())).limit,
        sum(part.left_out for part in parts.values()),
    )


def examples(
    tokens: np.ndarray, offsets: np.ndarray, answers: np.ndarray, documents: np.ndarray, limit: int | None
) -> Sequences:
    """Training examples as sequences; one longer than `limit` loses its beginning, as it does when it is evaluated.

    Raises StageError where none has a target.
    """
    starts, ends = offsets[:-1].astype(np.int64), offsets[1:].astype(np.int64)
    kept = starts if limit is None else np.maximum(starts, ends - limit)
    first = np.maximum(answers - (kept - starts), 1)
    return with_targets(Sequences(tokens, kept, ends, first, offsets.astype(np.int64), documents, limit))


def update_batches(count: int, batch: int, seed: int) -> list[Batch]:
    """Every sequence once, in a seeded order; the last batch may be smaller."""
    order = np.random.default_rng(seed).permutation(count)
    return [order[i : i + batch].tolist() for i in range(0, count, batch)]


def finetune_batches(lengths: np.ndarray, batch: int, steps: int, seed: int, window: int = WINDOW) -> list[Batch]:
    """`steps` full batches over seeded epochs.

    Within a window of batches examples are sorted by length, so that a batch holds like lengths, and then the window's
    batches are shuffled, so that a training does not go from short to long.
    """
    random = np.random.default_rng(seed)
    needed, count = steps * batch, len(lengths)
    stream = np.concatenate([random.permutation(count) for _ in range(ceil(needed / count))])[:needed]
    batches: list[Batch] = []
    for i in range(0, needed, window * batch):
        part = stream[i : i + window * batch]
        rows = part[np.argsort(lengths[part], kind="stable")].reshape(-1, batch)
        batches += rows[random.permutation(len(rows))].tolist()
    return batches


def micro_batches(data: Sequences, batch: Batch, world: int, budget: int) -> list[list[Batch]]:
    """Each rank's share of a global batch in micro-batches, longest sequences first, as many on every rank.

    One holds at most `budget` tokens with its padding, and at least one sequence; of a rank whose share needs fewer,
    the last are empty: DeepSpeed's collectives need the same number of passes everywhere.
    """
    shares = [list(_by_budget(data, batch[rank::world], budget)) for rank in range(world)]
    count = max(map(len, shares))
    return [[*share, *([[]] * (count - len(share)))] for share in shares]


def _by_budget(data: Sequences, share: Batch, budget: int) -> Iterator[Batch]:
    ordered, start = sorted(share, key=lambda i: -int(data.lengths[i])), 0
    while start < len(ordered):
        count = max(1, budget // padded(int(data.lengths[ordered[start]]), data.limit))
        yield ordered[start : start + count]
        start += count


@dataclass(frozen=True)
class Arrays:
    """One forward pass."""

    ids_BT: np.ndarray
    """int64, padded with 0 on the right: attention is causal, so no token sees the padding and no mask is needed."""
    positions_BT: np.ndarray | None
    """int64: each token's position in its document; None where no row holds more than one."""
    rows_N: np.ndarray
    """int64: positions in the flattened B·T that predict a target."""
    targets_N: np.ndarray


def collate(data: Sequences, ids: Batch) -> Arrays:
    """The sequences as arrays. No ids give one short sequence without targets: a pass that adds nothing."""
    if not ids:
        return Arrays(np.zeros((1, 2), np.int64), None, np.zeros(0, np.int64), np.zeros(0, np.int64))
    width = padded(max(int(data.lengths[i]) for i in ids), data.limit)
    ids_BT = np.zeros((len(ids), width), np.int64)
    begins_BT = np.zeros_like(ids_BT)
    rows, targets = [], []
    for row, i in enumerate(ids):
        tokens = data.tokens[data.starts[i] : data.ends[i]].astype(np.int64)
        ids_BT[row, : len(tokens)] = tokens
        boundaries = data.boundaries(i)
        begins_BT[row, boundaries] = boundaries
        predicted = np.setdiff1d(np.arange(data.answers[i], len(tokens)), boundaries, assume_unique=True)
        rows.append(row * width + predicted - 1)
        targets.append(tokens[predicted])
    joined = begins_BT.any()
    positions_BT = np.arange(width) - np.maximum.accumulate(begins_BT, axis=1) if joined else None
    return Arrays(ids_BT, positions_BT, np.concatenate(rows), np.concatenate(targets))


def padded(length: int, limit: int | None) -> int:
    """Width of a batch whose longest sequence has `length` tokens."""
    width = -(-length // PAD_MULTIPLE) * PAD_MULTIPLE
    return length if limit is not None and width > limit else width
