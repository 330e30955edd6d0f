"""Greedy generation with stop sequences, the text `HFLM.generate_until` returns.

Prompts of similar length share a batch, padded on the left; a row leaves its batch as soon as it is done. A pass also
checks guesses of the tokens after the next one (`drafts.py`): texts that repeat themselves take few passes.

Shape suffixes: B rows of a batch, S tokens of a pass, L tokens seen so far, R tokens of a pass that are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from portllm.errors import StageError
from portllm.formats.lmeval_generation import PLAIN, generation, not_greedy
from portllm.work.attention import shared_heads
from portllm.work.context import Progress, unheard
from portllm.work.drafts import LONGEST, Draft, length
from portllm.work.halving import in_halves
from portllm.work.head import Head, body
from portllm.work.kv_cache import attention_window, has_cache, joined, keep_columns, keeps_all, new_cache
from portllm.work.last_layer import LastLayer
from portllm.work.requests import RequestSet
from portllm.work.scoring import batches, max_length, padded

ROWS = 16
"""Token budgets that a batch fills with prompts and their texts: a pass for one more token takes nearly as long for a
dozen rows as for fifty."""
GAPS = 32
"""Columns of wrong guesses that are only masked: moving everything costs about what a pass does."""


@dataclass(frozen=True)
class Stops:
    """When a text ends, and where it is cut."""

    until: tuple[str, ...]
    room: int
    """Tokens of the window kept free for the text."""
    tokens: int
    """At most so many new ones."""
    ends: frozenset[int]
    """Token ids that end a text."""


@dataclass(frozen=True)
class Texts:
    """One text per request, cut before its first stop sequence."""

    texts: list[str]
    truncated: int
    """Requests whose prompt was cut from the left to leave room for the text."""
    halved: int
    """Batches that ran out of memory and were generated in halves."""


def generate(
    model: Any,
    tokenizer: Any,
    requests: RequestSet,
    budget: int,
    progress: Progress = unheard,
) -> Texts:
    """Continues the prompt of each request; a batch holds at most ROWS · `budget` tokens, texts and padding included.

    `progress` hears how many texts are done, of how many, whenever some of a batch have ended. Raises StageError for
    what is not greedy.
    """
    stops = _stops(requests.meta["generation"] or {}, model, tokenizer)
    room = max_length(model, requests) - stops.room
    if room < 1:
        raise StageError(f"task `{requests.meta['task']}` generates up to {stops.room} tokens, and the model's "
                         f"window of {room + stops.room} leaves no room for a prompt")  # fmt: skip
    if not has_cache(model):
        raise StageError(f"`{model.config.model_type}` keeps no keys and values between passes: it is scored by "
                         f"likelihoods only, not by what it generates")  # fmt: skip
    if empty := np.flatnonzero(np.diff(requests.offsets) == 0).tolist():
        raise StageError(f"the prompt of document {requests.doc_ids[requests.documents[empty[0]]]} has no token: give "
                         f"a tokenizer that begins a text with one, or leave the document out")  # fmt: skip
    head, last_layer = Head(model), LastLayer(model)
    texts: dict[int, str] = {}

    def work(batch: Sequence[int]) -> None:
        prompts = [requests.ids(request)[-room:] for request in batch]
        for ended in _continue(model, head, last_layer, tokenizer, prompts, stops, budget):
            for row, ids in ended:
                texts[batch[row]] = _cut(tokenizer.decode(ids, skip_special_tokens=True), stops.until)
            progress(len(texts), len(requests))

    with torch.inference_mode(), shared_heads(model):
        halved = sum(in_halves(batch, work) for batch in _batches(requests, room, stops.tokens, ROWS * budget))
    made = [texts[request] for request in range(len(requests))]
    return Texts(made, int((np.diff(requests.offsets) > room).sum()), halved)


def _stops(arguments: Mapping[str, Any], model: Any, tokenizer: Any) -> Stops:
    from lm_eval.models.utils import handle_stop_sequences

    if not_greedy(arguments):
        raise StageError(f"only greedy generation is supported; the task asks for {dict(arguments)}")
    kwargs = generation(arguments)
    config = model.generation_config
    if odd := [name for name, plain in PLAIN.items() if getattr(config, name, None) not in (None, plain)]:
        raise StageError(f"only greedy generation is supported; generation_config.json sets {', '.join(odd)}")
    ends = config.eos_token_id
    eos = tokenizer.decode(tokenizer.eos_token_id) if tokenizer.eos_token_id is not None else None
    until = handle_stop_sequences(list(kwargs["until"]), eos)
    # HFLM sets generate()'s total length, over which the model's own max_new_tokens wins.
    most = int(config.max_new_tokens or kwargs["max_gen_toks"])
    return Stops(
        until=tuple(term for term in until if term),
        room=int(kwargs["max_gen_toks"]),
        tokens=most if all(until) else 1,  # an empty stop sequence is in any text, once there is one
        ends=frozenset([] if ends is None else ends if isinstance(ends, list) else [ends]),
    )


def _batches(requests: RequestSet, room: int, new: int, budget: int) -> Iterator[list[int]]:
    """Requests by length of their prompt, longest first; prompts with `new` tokens behind them fill the budget."""
    lengths = np.minimum(np.diff(requests.offsets), room)
    order = np.argsort(-lengths, kind="stable")
    yield from (order[batch].tolist() for batch in batches((lengths[order] + new).tolist(), budget, passes=new))


def _continue(
    model: Any,
    head: Head,
    last_layer: LastLayer,
    tokenizer: Any,
    prompts: Sequence[np.ndarray],
    stops: Stops,
    budget: int,
) -> Iterator[list[tuple[int, list[int]]]]:
    """(row, its new token ids) of the prompts whose texts have ended, pass by pass.

    Every pass adds one token to all rows that still run, and those guessed right.
    """
    cache, mask_BL, chosen_BR = _read_prompts(model, head, last_layer, prompts, budget)
    running, rows = [Draft(ids.tolist()) for ids in prompts], list(range(len(prompts)))
    guesses: list[list[int]] = [[] for _ in running]
    forgets, read = keeps_all(model), 1
    while True:
        grown = [_grow(*row, tokenizer, stops) for row in zip(running, guesses, chosen_BR, strict=True)]
        keep = [b for b, (_, done) in enumerate(grown) if not done]
        if len(keep) < len(running):
            yield [(rows[b], running[b].text) for b, (_, done) in enumerate(grown) if done]
        if not keep:
            return
        if any(guesses):
            gained_B = torch.tensor([gained for gained, _ in grown], device=model.device)
            mask_BL[:, -read:] = torch.arange(read, device=model.device) < gained_B[:, None]
        mask_BL = _tidy(cache, mask_BL, keep, attention_window(model))
        running, rows = [running[b] for b in keep], [rows[b] for b in keep]
        rooms = [stops.tokens - len(draft.text) - 1 for draft in running]
        count = length([draft.chance for draft in running], min(LONGEST, max(rooms)) if forgets else 0)
        guesses = [draft.guess(min(count, room)) for draft, room in zip(running, rooms, strict=True)]
        going_on = [np.array([draft.ids[-1], *guess]) for draft, guess in zip(running, guesses, strict=True)]
        ids_BS, new_BS = _masked(going_on, model.device)
        mask_BL, read = torch.cat([mask_BL, new_BS], dim=1), ids_BS.shape[1]
        chosen_BR = _choose(model, head, last_layer, ids_BS, mask_BL, cache, read)


def _read_prompts(
    model: Any, head: Head, last_layer: LastLayer, prompts: Sequence[np.ndarray], budget: int
) -> tuple[Any, torch.Tensor, list[list[int]]]:
    """Keys and values of the prompts, the mask of those that are no padding [B, L], and each text's first token [B][1].

    At most `budget` tokens a pass: what a larger one holds for a moment fits no cache of a processor, and is fetched
    from the system anew every time (12 prompts of 1,108 tokens, Gemma 3 270M in float32, one thread: 58 s at once, 44
    one by one).
    """
    joins, whole = keeps_all(model), slice(0, len(prompts))
    parts = batches([len(ids) for ids in prompts], budget) if joins else [whole]
    caches, chosen = [], list[list[int]]()
    for part in parts:
        caches.append(new_cache(model))
        ids_BS, mask_BS = _masked(prompts[part], model.device, left=True)
        chosen += _choose(model, head, last_layer, ids_BS, mask_BS, caches[-1], 1)
    _, mask_BL = _masked(prompts, model.device, left=True)
    return joined(caches, mask_BL.shape[1]) if joins else caches[0], mask_BL, chosen


def _choose(
    model: Any, head: Head, last_layer: LastLayer, ids_BS: torch.Tensor, mask_BL: torch.Tensor, cache: Any, read: int
) -> list[list[int]]:
    """The most likely next token after each of the last `read` tokens of every row: [B][R]."""
    positions = (mask_BL.cumsum(1) - 1).clamp(min=0)[:, -ids_BS.shape[1] :]
    places = torch.arange(ids_BS.numel(), device=ids_BS.device).view(ids_BS.shape)[:, -read:].flatten()
    with last_layer.reading(places, ids_BS.numel()):
        hidden_BSD = body(model)(
            input_ids=ids_BS, attention_mask=mask_BL, position_ids=positions, past_key_values=cache, use_cache=True
        ).last_hidden_state
    chosen: list[list[int]] = head.best(hidden_BSD.flatten(0, 1)[places]).view(-1, read).tolist()
    return chosen


def _grow(draft: Draft, guess: Sequence[int], chosen: Sequence[int], tokenizer: Any, stops: Stops) -> tuple[int, bool]:
    """(tokens the text gains, whether it has ended): the guessed ones that were chosen, and the choice after them."""
    right = 0
    while right < len(guess) and guess[right] == chosen[right]:
        right += 1
    for gained, token in enumerate(chosen[: right + 1], start=1):
        draft.append(token)
        if len(draft.text) == stops.tokens or _done(draft.text, tokenizer, stops):
            return gained, True
    return right + 1, False


def _tidy(cache: Any, mask_BL: torch.Tensor, keep: Sequence[int], window: int | None) -> torch.Tensor:
    """Takes rows that have ended out of the cache: the mask of what is left.

    Wrong guesses are only masked, until a row has many of them or a sliding window would count them in the next pass.
    """
    if len(keep) < len(mask_BL):
        rows = torch.tensor(keep, device=mask_BL.device)
        cache.reorder_cache(rows)
        mask_BL = mask_BL[rows]
    columns, longest = mask_BL.shape[1], int(mask_BL.sum(dim=1).max())
    if columns - longest <= GAPS and not (window is not None and columns + LONGEST >= window):
        return mask_BL
    if not (mask_BL[:, :-1] > mask_BL[:, 1:]).any():
        return mask_BL
    order_BL = mask_BL.argsort(dim=1, stable=True)[:, -longest:]
    keep_columns(cache, order_BL)
    return mask_BL.gather(1, order_BL)


def _masked(rows: Sequence[np.ndarray], device: torch.device, left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask of what is no padding), int64 [B, S]."""
    return padded(rows, left).to(device), padded([np.ones_like(ids) for ids in rows], left).to(device)


def _done(ids: list[int], tokenizer: Any, stops: Stops) -> bool:
    """Whether the text has ended: by its last token, or by a stop sequence among its last tokens.

    A token is at least one byte, so a stop sequence lies within as many tokens as it has bytes. What a window's text
    shows must be in the whole text too: some tokenizers write a text's first blank differently.
    """
    if ids[-1] in stops.ends:
        return True
    window = max((len(term.encode()) for term in stops.until), default=0) + 2
    recent = tokenizer.decode(ids[-window:], skip_special_tokens=True)
    if not any(term in recent for term in stops.until):
        return False
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return any(term in text for term in stops.until)


def _cut(text: str, until: Sequence[str]) -> str:
    for term in until:
        text = text.split(term)[0]
    return text
