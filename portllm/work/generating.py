"""Greedy generation with stop sequences, the text `HFLM.generate_until` returns.

Prompts of similar length share a batch, padded on the left; a row leaves its batch as soon as it is done.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from portllm.errors import StageError
from portllm.work.halving import in_halves
from portllm.work.head import Head, body
from portllm.work.last_layer import LastLayer
from portllm.work.requests import RequestSet
from portllm.work.scoring import batches, max_length

_MAX_TOKENS = 256
"""HFLM's default for max_gen_toks."""
ROWS = 8
"""Token budgets that a batch fills with prompts and their texts: a pass for one more token takes nearly as long for a
dozen rows as for fifty."""
_PLAIN = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "num_beams": 1, "min_length": 0, "min_new_tokens": 0,
          "suppress_tokens": [], "bad_words_ids": [], "forced_eos_token_id": None}  # fmt: skip
"""Settings of a generation_config.json that would move a greedy choice, and their values that do not."""
_GREEDY = {"do_sample", "temperature", "until", "max_gen_toks", "top_p", "top_k"}


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


def generate(model: Any, tokenizer: Any, requests: RequestSet, budget: int) -> Texts:
    """Continues the prompt of each request; a batch holds at most ROWS · `budget` tokens, texts and padding included.

    Raises StageError for what is not greedy.
    """
    stops = _stops(requests.meta["generation"] or {}, model, tokenizer)
    room = max_length(model, requests) - stops.room
    if room < 1:
        raise StageError(f"task `{requests.meta['task']}` generates up to {stops.room} tokens, and the model's "
                         f"window of {room + stops.room} leaves no room for a prompt")  # fmt: skip
    head, last_layer = Head(model), LastLayer(model)
    texts = [""] * len(requests)

    def work(batch: Sequence[int]) -> None:
        prompts = [requests.ids(request)[-room:] for request in batch]
        for request, ids in zip(batch, _continue(model, head, last_layer, tokenizer, prompts, stops), strict=True):
            texts[request] = _cut(tokenizer.decode(ids, skip_special_tokens=True), stops.until)

    with torch.inference_mode():
        halved = sum(in_halves(batch, work) for batch in _batches(requests, room, stops.tokens, ROWS * budget))
    return Texts(texts, int((np.diff(requests.offsets) > room).sum()), halved)


def _stops(arguments: Mapping[str, Any], model: Any, tokenizer: Any) -> Stops:
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

    kwargs = normalize_gen_kwargs(dict(arguments), _MAX_TOKENS)
    if kwargs.get("do_sample") or kwargs.get("temperature") or set(kwargs) - _GREEDY:
        raise StageError(f"only greedy generation is supported; the task asks for {dict(arguments)}")
    config = model.generation_config
    if odd := [name for name, plain in _PLAIN.items() if getattr(config, name, None) not in (None, plain)]:
        raise StageError(f"only greedy generation is supported; generation_config.json sets {', '.join(odd)}")
    ends = config.eos_token_id
    eos = tokenizer.decode(tokenizer.eos_token_id) if tokenizer.eos_token_id is not None else None
    return Stops(
        until=tuple(term for term in handle_stop_sequences(list(kwargs["until"]), eos) if term),
        room=int(kwargs["max_gen_toks"]),
        # HFLM sets generate()'s total length, over which the model's own max_new_tokens wins.
        tokens=int(config.max_new_tokens or kwargs["max_gen_toks"]),
        ends=frozenset([] if ends is None else ends if isinstance(ends, list) else [ends]),
    )


def _batches(requests: RequestSet, room: int, new: int, budget: int) -> Iterator[list[int]]:
    """Requests by length of their prompt, longest first; prompts with `new` tokens behind them fill the budget."""
    lengths = np.minimum(np.diff(requests.offsets), room)
    order = np.argsort(-lengths, kind="stable")
    yield from (order[batch].tolist() for batch in batches((lengths[order] + new).tolist(), budget, passes=new))


def _continue(
    model: Any, head: Head, last_layer: LastLayer, tokenizer: Any, prompts: Sequence[np.ndarray], stops: Stops
) -> list[list[int]]:
    """New token ids of each prompt, one forward pass a token for all rows that still run."""
    from transformers import DynamicCache

    ids_BS, mask_BS = _left_padded(prompts, model.device)
    cache = DynamicCache(config=model.config)
    texts: list[list[int]] = [[] for _ in prompts]
    running = list(range(len(prompts)))
    for _ in range(stops.tokens):
        positions = (mask_BS.cumsum(1) - 1).clamp(min=0)[:, -ids_BS.shape[1] :]
        last_B = ids_BS.shape[1] * torch.arange(1, len(ids_BS) + 1, device=ids_BS.device) - 1
        with last_layer.reading(last_B, ids_BS.numel()):
            hidden_BSD = body(model)(
                input_ids=ids_BS, attention_mask=mask_BS, position_ids=positions, past_key_values=cache, use_cache=True
            ).last_hidden_state
        chosen = head.best(hidden_BSD[:, -1]).tolist()
        for row, token in zip(running, chosen, strict=True):
            texts[row].append(token)
        keep = [b for b, row in enumerate(running) if not _done(texts[row], tokenizer, stops)]
        if not keep:
            break
        kept = torch.tensor(keep, device=model.device)
        if len(keep) < len(running):
            cache.batch_select_indices(kept)
        running = [running[b] for b in keep]
        ids_BS = torch.tensor([[chosen[b]] for b in keep], device=model.device)
        mask_BS = torch.cat([mask_BS[kept], mask_BS.new_ones(len(keep), 1)], dim=1)
    return texts


def _left_padded(prompts: Sequence[np.ndarray], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(ids) for ids in prompts)
    ids_BS, mask_BS = np.zeros((2, len(prompts), longest), dtype=np.int64)
    for b, ids in enumerate(prompts):
        ids_BS[b, longest - len(ids) :] = ids
        mask_BS[b, longest - len(ids) :] = 1
    return torch.from_numpy(ids_BS).to(device), torch.from_numpy(mask_BS).to(device)


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
