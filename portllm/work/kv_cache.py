"""What a model remembers between two forward passes, and how far back it looks.

Shape suffixes: B rows, H heads, L columns (tokens, padding and gaps), C columns that there is room for, D head size.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch

from portllm.work.head import body

ROOM = 64
"""Columns that a cache is larger than what it holds, whenever it has to grow."""


def has_cache(model: Any) -> bool:
    """Whether a pass goes on from the keys and values it is given, in the common form: MiniMax has its own."""
    return (
        type(model)._supports_default_dynamic_cache()
        and "past_key_values" in inspect.signature(type(body(model)).forward).parameters
    )


def keeps_all(model: Any) -> bool:
    """Whether the keys and values of all tokens are all that a model remembers of them.

    Only then can one token follow several others' pass, or be forgotten again: a recurrent state is one for all that
    came before; attention in chunks, GPT-Neo's window and MPT's distances count columns, padding and gaps included.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    config = model.config.get_text_config()
    if config.model_type in ("mpt", "gpt_neo") or getattr(config, "attention_chunk_size", None):
        return False
    if not has_cache(model):
        return False
    layers = DynamicCache(config=model.config).layers
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def attention_window(model: Any) -> int | None:
    """Tokens that a layer with sliding attention sees; None where every layer sees all."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    sliding = kinds is None or "sliding_attention" in kinds
    return getattr(config, "sliding_window", None) if sliding else None


def new_cache(model: Any) -> Any:
    """An empty cache; of a model that keeps all, one that `joined` takes."""
    from transformers import DynamicCache

    return DynamicCache() if keeps_all(model) else DynamicCache(config=model.config)


def joined(caches: Sequence[Any], columns: int) -> Any:
    """The rows of the caches, padded on the left to so many columns, in one that grows in place; they are empty then.

    transformers' own copies all keys and values in every pass, into memory that the system has to fetch anew.
    """
    from transformers import DynamicCache

    cache = DynamicCache()
    for number in range(len(caches[0].layers)):
        cache.layers.append(_roomy()([one.layers[number] for one in caches], columns))
        for one in caches:
            one.layers[number] = None
    return cache


def keep_columns(cache: Any, order_BL: torch.Tensor) -> None:
    """Row by row the columns of `order_BL`, in that order. For a cache that `joined` made."""
    spare = None
    for layer in cache.layers:
        spare = layer.keep(order_BL, spare)


@functools.cache
def _roomy() -> Any:
    from transformers.cache_utils import DynamicLayer

    class Roomy(DynamicLayer):
        """Keys and values at the beginning of buffers [B, H, C, D]: a pass writes its own behind them."""

        def __init__(self, parts: Sequence[Any], columns: int) -> None:
            super().__init__()
            self.lazy_initialization(parts[0].keys, parts[0].values)
            self.held = {}
            for name in ("keys", "values"):
                tensors = [getattr(part, name) for part in parts]
                rows, (_, heads, _, size) = sum(len(tensor) for tensor in tensors), tensors[0].shape
                held = self.held[name] = tensors[0].new_zeros(rows, heads, columns + ROOM, size)
                begin = 0
                for tensor in tensors:
                    held[begin : begin + len(tensor), :, columns - tensor.shape[2] : columns] = tensor
                    begin += len(tensor)
            self._show(columns)

        def update(self, key_states: Any, value_states: Any, *_: Any, **__: Any) -> tuple[Any, Any]:
            used, new = self.get_seq_length(), key_states.shape[2]
            for name, states in (("keys", key_states), ("values", value_states)):
                held = self.held[name]
                if used + new > held.shape[2]:
                    rows, heads, _, size = held.shape
                    larger = held.new_zeros(rows, heads, used + new + ROOM, size)
                    larger[:, :, :used] = held[:, :, :used]
                    held = self.held[name] = larger
                held[:, :, used : used + new] = states
            self._show(used + new)
            return self.keys, self.values

        def reorder_cache(self, beam_idx: torch.Tensor) -> None:
            self.held = {name: held[beam_idx] for name, held in self.held.items()}
            self._show(self.get_seq_length())

        def keep(self, order_BL: torch.Tensor, spare: torch.Tensor | None) -> torch.Tensor:
            """Takes `spare` (or what it must make) as a buffer, and leaves one that is free."""
            for name, held in self.held.items():
                rows, heads, room, size = held.shape
                if spare is None or spare.shape != held.shape:
                    spare = torch.empty_like(held)
                rest = torch.arange(order_BL.shape[1], room, device=held.device).expand(rows, -1)
                order_BC = torch.cat([order_BL, rest], dim=1)
                each_BH1 = torch.arange(rows * heads, device=held.device).view(rows, heads, 1)
                places = (each_BH1 * room + order_BC[:, None]).flatten()
                torch.index_select(held.view(-1, size), 0, places, out=spare.view(-1, size))
                self.held[name], spare = spare, held
            self._show(order_BL.shape[1])
            assert spare is not None
            return spare

        def _show(self, columns: int) -> None:
            self.keys, self.values = (self.held[name][:, :, :columns] for name in ("keys", "values"))

    return Roomy
