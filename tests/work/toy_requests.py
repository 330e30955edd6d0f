"""Random models of many architectures, and requests that fit them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers

from portllm.work.requests import RequestSet

VOCABULARY = 97
SHAPE: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def tiny(kind: str, **changes) -> Any:
    """A random model with weights large enough for its scores to differ."""
    shape = SHAPE | {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
    local = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 8,
             "max_position_embeddings": 64, "attention_types": [[["global", "local"], 1]]}  # fmt: skip
    config = {
        "llama": lambda: transformers.LlamaConfig(**shape | changes),
        "mistral": lambda: transformers.MistralConfig(**shape | {"sliding_window": 8} | changes),
        "gemma2": lambda: transformers.Gemma2Config(**shape | {"head_dim": 8, "sliding_window": 8} | changes),
        "gemma3": lambda: transformers.Gemma3TextConfig(**shape | {"head_dim": 8, "sliding_window": 8} | changes),
        "gpt2": lambda: transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64),
        "phi": lambda: transformers.PhiConfig(**shape | changes),  # its head has a bias
        "gpt_neo": lambda: transformers.GPTNeoConfig(**local | changes),
        "lfm2": lambda: transformers.Lfm2Config(
            **shape | {"layer_types": ["conv", "full_attention"], "block_ff_dim": 48} | changes
        ),
        "phi3": lambda: transformers.Phi3Config(
            **shape
            | {
                "original_max_position_embeddings": 16,
                "pad_token_id": 0,
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "original_max_position_embeddings": 16,
                    "short_factor": [1.0, 1.1, 1.2, 1.3],
                    "long_factor": [2.0, 4.0, 6.0, 8.0],
                },
            }
            | changes
        ),
        "minimax": lambda: transformers.MiniMaxConfig(**shape | {"num_local_experts": 2} | changes),
        "granite": lambda: transformers.GraniteConfig(**shape | {"logits_scaling": 8.0} | changes),
        "cohere2": lambda: transformers.Cohere2Config(**shape | {"logit_scale": 0.25, "sliding_window": 8} | changes),
    }[kind]()
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0) if parameter.dim() > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def request_set(pairs: Sequence[tuple[Sequence[int], Sequence[int]]], **meta) -> RequestSet:
    """One document per (context, continuation)."""
    rows = [np.asarray([*context, *continuation], dtype=np.uint32) for context, continuation in pairs]
    count = np.arange(len(pairs))
    return RequestSet(
        tokens=np.concatenate(rows), offsets=np.cumsum([0, *map(len, rows)]),
        answers=np.asarray([len(context) for context, _ in pairs]), documents=count, choices=count * 0, doc_ids=count,
        doc_hashes=np.asarray([b"x"] * len(pairs)), meta={"model_max_length": 64, "task": "t", **meta},
    )  # fmt: skip


def drawn(count: int = 10, longest: int = 40, seed: int = 1) -> list[tuple[list[int], list[int]]]:
    """Contexts of many lengths with two continuations each: of one token, of several, one beginning another."""
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(count):
        context = rng.integers(3, VOCABULARY, rng.integers(1, longest)).tolist()
        one, more = rng.integers(3, VOCABULARY, 2).tolist(), rng.integers(3, VOCABULARY, 4).tolist()
        pairs += [(context, one[:1]), (context, one[1:]), (context, more), (context, more[:2])]
    return pairs


def at_most(rows: int, forward: Any) -> Any:
    """A forward pass that runs out of memory above a number of rows, as torch's allocator of the host says it."""

    def small(*arguments, **named):
        if len(named["input_ids"]) > rows:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 1 byte")
        return forward(*arguments, **named)

    return small
