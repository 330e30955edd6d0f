"""The paper's trainable parameters: r = 8 on every linear module, counted on the meta device (no weight is made)."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from portllm.resolve.shapes import SHIPPED, load_config
from portllm.study.recipes import Lora
from portllm.work.lora import attach

QWEN2_05B = {
    "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14,
    "num_hidden_layers": 24, "num_key_value_heads": 2, "tie_word_embeddings": True, "vocab_size": 151936,
}  # fmt: skip


def config_of(name: str) -> dict[str, Any]:
    return QWEN2_05B if name == "qwen2-0.5b" else load_config(SHIPPED / f"{name}.json")


@pytest.mark.parametrize(
    ("name", "trainable", "total"),
    [
        ("mistral-7b-v0.1", 20_971_520, 7_241_732_096),
        ("llama-3.1-8b", 20_971_520, 8_030_261_248),
        ("llama-2-7b", 19_988_480, 6_738_415_616),
        ("gemma-2-9b", 27_009_024, 9_241_705_984),
        ("qwen2-0.5b", 4_399_104, 494_032_768),
    ],
)
def test_a_rank_8_patch_of_every_linear_module_has_the_paper_s_size(name: str, trainable: int, total: int) -> None:
    settings = dict(config_of(name))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings))
        assert sum(p.numel() for p in model.parameters()) == total
        adapted = attach(model, Lora(8, 16), seed=1)
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == trainable
