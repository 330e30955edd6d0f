"""What a model remembers between two forward passes, and how far back it looks."""

import inspect
from typing import Any

from portllm.work.head import body


def has_cache(model: Any) -> bool:
    """Whether a pass goes on from the keys and values it is given."""
    return "past_key_values" in inspect.signature(type(body(model)).forward).parameters


def keeps_all(model: Any) -> bool:
    """Whether the keys and values of all tokens are all that a model remembers of them.

    Only then can one token follow several others' pass, or be forgotten again: a recurrent state is one for all that
    came before, attention in chunks and MPT's distances count columns, padding and gaps included.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    config = model.config.get_text_config()
    if config.model_type == "mpt" or getattr(config, "attention_chunk_size", None):
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
