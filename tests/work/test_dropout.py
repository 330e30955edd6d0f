"""No training drops anything: a model or a patch that asks for it is refused, never silenced."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig

from portllm.errors import StageError
from portllm.formats.dropout import dropouts
from portllm.study.recipes import Base, Lora, Optimization, Text
from portllm.work.base import base
from portllm.work.context import RunContext
from portllm.work.lora import attach, go_on
from portllm.work.loss import require_no_dropout
from portllm.work.versions import Versions
from tests.work import toy_training as toy
from tests.work.checkpoints import save_adapter, save_model

pytestmark = pytest.mark.real

TINY = {"vocab_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16}
GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}


def fresh(config: Any) -> Any:
    return AutoModelForCausalLM.from_config(config)


def test_a_training_of_a_model_with_dropout_is_refused_by_name_with_its_mend(tmp_path: Path) -> None:
    model = toy.model()
    model.config.attention_dropout = 0.1
    with pytest.raises(StageError, match=r"`attention_dropout` is 0.1, and a training here has no dropout: .*`path`"):
        toy.train(
            model, toy.data(), toy.batches(), toy.OPTIMIZATION, "full", toy.context(tmp_path, toy.Layout()), tmp_path
        )


def test_a_default_of_transformers_counts_as_well_as_a_stated_value() -> None:
    with pytest.raises(StageError, match=r"_pdrop` is 0.1 \(and 2 more\)"):
        require_no_dropout(fresh(GPT2Config(vocab_size=32, **GPT2)))


def test_noise_in_a_router_is_no_better() -> None:
    from transformers import MixtralConfig, PhimoeConfig

    small = {**TINY, "intermediate_size": 16, "num_key_value_heads": 2, "num_local_experts": 4}
    for noisy in (MixtralConfig(**small, router_jitter_noise=0.1), PhimoeConfig(**small)):
        with pytest.raises(StageError, match="`router_jitter_noise` is 0.0?1"):
            require_no_dropout(fresh(noisy))
    require_no_dropout(fresh(MixtralConfig(**small)))


def test_dropout_of_heads_that_are_not_there_is_no_dropout() -> None:
    config = GPTNeoXConfig(**TINY, intermediate_size=16)
    assert config.classifier_dropout == 0.1
    require_no_dropout(fresh(config))
    assert dropouts(GPT2Config(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0.0).to_dict()) == {}


def test_a_text_model_s_own_configuration_counts_and_no_flag_or_text_does() -> None:
    assert dropouts({"text_config": {"attention_dropout": 0.2}, "attention_dropout": 0}) == {"attention_dropout": 0.2}
    assert dropouts({"attention_dropout": 0, "layerdrop": 0.5, "drop_last": True, "drop": None}) == {"layerdrop": 0.5}


def test_dropout_that_stands_in_no_configuration_is_seen_in_the_modules() -> None:
    model = fresh(LlamaConfig(**TINY, intermediate_size=16))
    model.model.layers[0].extra = torch.nn.Dropout(0.3)
    with pytest.raises(StageError, match=r"`model.layers.0.extra.p` is 0.3, .* LlamaForCausalLM states it in no conf"):
        require_no_dropout(model)


def test_a_patch_with_dropout_is_not_trained_further(tmp_path: Path) -> None:
    root = save_model(tmp_path / "root", "llama")
    model = AutoModelForCausalLM.from_pretrained(root)
    go_on(model, save_adapter(tmp_path / "patch", root, lora_dropout=0.1))
    with pytest.raises(StageError, match=r"lora_dropout.default.p` is 0.1 .*`lora_dropout`: 0 in the adapter_config"):
        require_no_dropout(model)
    plain = AutoModelForCausalLM.from_pretrained(root)
    attach(plain, Lora(4, 8), seed=1)
    require_no_dropout(plain)


def test_a_model_made_from_nothing_has_no_dropout_unless_its_study_says_so(tmp_path: Path) -> None:
    recipe = Base(
        "init", model_type="gpt2", config=GPT2, vocabulary=300, text=Text(generator="reviews", documents=60, seed=3),
        tokens=512, sequence_length=32, optimization=Optimization(learning_rate=5e-3, batch=8, seed=1),
    )  # fmt: skip
    run = RunContext(tmp_path / "scratch", Versions(), log=lambda line: None)
    (tmp_path / "root").mkdir()
    base(recipe, {}, tmp_path / "root", run)
    config = AutoConfig.from_pretrained(tmp_path / "root")
    assert (config.resid_pdrop, config.embd_pdrop, config.attn_pdrop) == (0, 0, 0)
    asked = replace(recipe, config=GPT2 | {"resid_pdrop": 0.1})
    with pytest.raises(StageError, match="`resid_pdrop` is 0.1"):
        base(asked, {}, tmp_path / "asked", run)
