"""Tiny models written by transformers and adapters written by PEFT, with random factors: what a user would bring."""

from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

torch.set_num_threads(1)

_COMMON = {"vocab_size": 96, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LLAMA = _COMMON | {
    "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 10, "initializer_range": 0.1,
}  # fmt: skip
_ALTERNATING = {
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 8,
    "tie_word_embeddings": True,
}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
"""0.1 by default in GPT-2."""
CONFIGS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**_LLAMA, tie_word_embeddings=False),
    "mistral": lambda: transformers.MistralConfig(**_LLAMA, tie_word_embeddings=True),
    "gpt2": lambda: transformers.GPT2Config(**_COMMON, n_embd=40, n_layer=2, n_head=4, **NO_DROPOUT),
    "gemma2": lambda: transformers.Gemma2Config(**_LLAMA | _ALTERNATING),
    "gemma3": lambda: transformers.Gemma3TextConfig(**_LLAMA | _ALTERNATING),
    "qwen2": lambda: transformers.Qwen2Config(**_LLAMA, tie_word_embeddings=False),
    "phi3": lambda: transformers.Phi3Config(**_LLAMA, tie_word_embeddings=False),
}
BASIC = ("llama", "mistral", "gpt2")
"""Untied, tied, transposed: enough for what depends on none of the others' names, norms, biases and fused layers."""


def save_model(out: Path, architecture: str, dtype: torch.dtype = torch.float32, seed: int = 0, **save: Any) -> Path:
    """A randomly initialised model, as `save_pretrained` writes it."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[architecture]())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases start equal: one that takes another's place would not show
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.to(dtype)
    model.save_pretrained(out, **save)
    return out


def save_adapter(out: Path, model: Path, seed: int = 1, std: float = 0.1, **config: Any) -> Path:
    """An adapter with random A and B, as PEFT writes it."""
    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | config
    adapted = get_peft_model(load(model, torch.float32), LoraConfig(**settings))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=std)
    adapted.save_pretrained(out)
    return out


def load(model: Path, dtype: torch.dtype) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype)


def peft_merged(model: Path, adapter: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights that PEFT's own merge gives."""
    return PeftModel.from_pretrained(load(model, dtype), adapter).merge_and_unload().state_dict()


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes: equality of bits, where == would take -0 for 0."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(bits(first[name]), bits(second[name])) for name in first
    )
