"""A model's sizes: exact from safetensors headers, by arithmetic from a configuration when no weights are at hand."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from portllm.errors import ResolveError
from portllm.formats.adapter import HEADS, last_part, ties_embeddings
from portllm.study.facts import Shape
from portllm.study.recipes import Dtype

SHIPPED = Path(__file__).parent / "shapes"
"""Configurations of the paper's four models, so that its grid plans offline."""

_BLOCK = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Linear modules of one block, in the order of `_from_config`."""
_GATED = {"llama", "mistral", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"}


def from_tensors(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], storage: Dtype) -> Shape:
    """Shape of a model whose headers are known."""
    outside = ("embed", "wte", "wpe", "lm_head", "norm", "vision", "visual", "audio", "multi_modal")
    linear = [
        (s[0], s[1])
        for name, s in shapes.items()
        if len(s) == 2 and name.endswith(".weight") and not any(word in name.lower() for word in outside)
    ]
    tied = ties_embeddings(config, shapes)
    count = sum(_product(s) for name, s in shapes.items() if not (tied and last_part(name) in HEADS))
    norms = sum(s[0] for name, s in shapes.items() if len(s) == 1 and name.endswith(".weight"))
    return _shape(count, tuple(linear), _modules(shapes), config, storage, tied, norms)


def _modules(shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
    """Names a LoRA may target; none for a mixture of experts, whose names in memory differ from those on disk."""
    if any("experts" in name for name in shapes):
        return ()
    parts = [name.split(".") for name, s in shapes.items() if len(s) == 2 and name.endswith(".weight")]
    return tuple(sorted({"lm_head", *(p[-2] for p in parts)}))


def from_config(config: Mapping[str, Any], storage: Dtype) -> Shape | None:
    """Shape of a gated-MLP decoder (Llama, Mistral, Gemma, Qwen2) from its configuration; None for other families."""
    try:
        return _from_config(config, storage)
    except (TypeError, ValueError, ZeroDivisionError, KeyError) as error:
        raise ResolveError(f"a model's configuration gives no shape ({type(error).__name__}: {error})") from None


def _from_config(config: Mapping[str, Any], storage: Dtype) -> Shape | None:
    if config.get("model_type") not in _GATED or not {"hidden_size", "num_hidden_layers"} <= config.keys():
        return None
    hidden, layers, inner = config["hidden_size"], config["num_hidden_layers"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    size = config.get("head_dim") or hidden // heads
    query, value = heads * size, config.get("num_key_value_heads", heads) * size
    block = [
        (query, hidden),
        (value, hidden),
        (value, hidden),
        (hidden, query),
        (inner, hidden),
        (inner, hidden),
        (hidden, inner),
    ]
    linear = tuple(block * layers)
    embeddings = config["vocab_size"] * hidden * (1 if _tied(config) else 2)
    norms = (4 if config["model_type"].startswith(("gemma2", "gemma3")) else 2) * hidden * layers + hidden
    norms += 2 * size * layers if config["model_type"] in ("gemma3_text", "qwen3") else 0  # of queries and keys
    biases = (query + 2 * value) * layers if config["model_type"] == "qwen2" else 0
    count = sum(a * b for a, b in linear) + embeddings + norms + biases
    modules = tuple(sorted({"embed_tokens", "lm_head", *_BLOCK}))
    return _shape(count, linear, modules, config, storage, _tied(config), norms)


def load_config(path: Path) -> dict[str, Any]:
    """A model's config.json."""
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ResolveError(f"{path}: missing; a model directory needs config.json") from None
    except (ValueError, RecursionError) as error:
        raise ResolveError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise ResolveError(f"{path}: a model's configuration is a JSON object")
    return config


def shipped(name: str) -> Path | None:
    """File of a configuration that ships with portllm."""
    path = SHIPPED / f"{name}.json"
    return path if path.is_file() else None


def _tied(config: Mapping[str, Any]) -> bool:
    default = str(config.get("model_type")).startswith("gemma")
    return bool(config.get("tie_word_embeddings", default))


def _shape(
    count: int,
    linear: tuple[tuple[int, int], ...],
    modules: tuple[str, ...],
    config: Mapping[str, Any],
    storage: Dtype,
    tied: bool,
    norms: int,
) -> Shape:
    text = config.get("text_config") or config
    return Shape(
        parameters=count,
        linear=linear,
        modules=modules,
        layers=int(text.get("num_hidden_layers") or text.get("n_layer") or 0),
        hidden=int(text.get("hidden_size") or text.get("n_embd") or 0),
        vocabulary=int(text.get("vocab_size") or 0),
        tied=tied,
        norms=norms,
        max_positions=int(text.get("max_position_embeddings") or text.get("n_positions") or 0),
        storage=storage,
    )


def _product(shape: tuple[int, ...]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result
