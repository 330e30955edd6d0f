"""Stage `base`: a model directory made from nothing, from the hub, or from a GGUF file."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from portllm.errors import ResolveError, StageError
from portllm.study.generators import generate
from portllm.study.recipes import Base, Optimization, Text
from portllm.work.base import base, train_tokenizer
from portllm.work.context import RunContext, Summary
from portllm.work.tokenizing import Encoder
from portllm.work.versions import Versions

pytestmark = pytest.mark.real

SHAPE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip
RECIPE = Base(
    "init", model_type="mistral", config=SHAPE, vocabulary=400, text=Text(generator="reviews", documents=600, seed=3),
    tokens=8000, sequence_length=32, optimization=Optimization(learning_rate=5e-3, batch=8, seed=1),
)  # fmt: skip


def make(out: Path, recipe: Base, **inputs: Path) -> Summary:
    out.mkdir(exist_ok=True)
    return base(recipe, inputs, out, RunContext(out.parent / "scratch", Versions(), log=lambda line: None))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Summary]:
    out = tmp_path_factory.mktemp("base") / "root"
    return out, make(out, RECIPE)


def test_a_model_made_from_nothing_is_pretrained_and_loads(made: tuple[Path, Summary]) -> None:
    out, ledger = made
    assert ledger["loss_last"] < ledger["loss_first"] - 1
    assert ledger["tokens"] == 8000
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.config.vocab_size == len(tokenizer) == ledger["vocabulary"]
    assert model.config.eos_token_id == tokenizer.eos_token_id == model.generation_config.eos_token_id
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 4


def test_the_same_recipe_gives_the_same_bits(made: tuple[Path, Summary], tmp_path: Path) -> None:
    torch.rand(3)
    np.random.rand(3)
    make(tmp_path / "again", RECIPE)
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (made[0] / name).read_bytes()


@pytest.mark.parametrize("kind", ["word", "bpe"])
def test_context_and_continuation_split_as_lm_eval_splits_them(kind: Any) -> None:
    """`TemplateLM._encode_pair`: the continuation is what encode(context + continuation) has beyond the context."""
    texts = list(generate("reviews", 300, 3)) + ["Review: it's fine. Answer: good"] * 3
    tokenizer = train_tokenizer(replace(RECIPE, tokenizer=kind, vocabulary=500), iter(texts))
    pairs = [(text, answer) for text in (*texts[:20], "Review: it's fine. Answer:") for answer in (" good", " yes")]
    for (context, continuation), (ids, first) in zip(pairs, Encoder(tokenizer).pairs(pairs), strict=True):
        assert ids[:first] == tokenizer(context)["input_ids"]
        assert tokenizer.decode(ids[first:]).strip() == continuation.strip()
        assert tokenizer.decode(ids) == context + continuation
        assert tokenizer.unk_token_id not in ids


def test_words_look_alike_wherever_they_stand_and_unknown_ones_are_unk() -> None:
    tokenizer = train_tokenizer(RECIPE, iter(["the soup was fine. the end"]))
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("the soup, the cook")["input_ids"])
    assert tokens == [" the", " soup", "<unk>", " the", "<unk>"]


def test_storage_dtype_is_that_of_the_saved_weights(tmp_path: Path) -> None:
    make(tmp_path / "out", replace(RECIPE, tokens=0, storage="bfloat16"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 10**7}, "the corpus has"),
        ({"model_type": "mistrel"}, "mistrel"),
        ({"optimization": None}, "optimization"),
    ],
)
def test_what_cannot_be_made_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=message):
        make(tmp_path / "out", replace(RECIPE, **change))


def test_a_hub_out_of_reach_names_the_repository_and_the_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    recipe = Base("hub", hub="someone/model", revision="0" * 40)
    with pytest.raises(ResolveError, match=r"someone/model.*HF_HUB_OFFLINE.*give its directory"):
        make(tmp_path / "out", recipe)


def test_a_gguf_file_becomes_a_model_directory(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=300, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    write_gguf(tmp_path / "tiny.gguf", model)
    make(tmp_path / "out", Base("gguf", storage="bfloat16"), source=tmp_path / "tiny.gguf")
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert made.dtype == torch.bfloat16
    expected = model.bfloat16().state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in made.state_dict().items())
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("ab", add_special_tokens=False)["input_ids"] == [256]


def write_gguf(path: Path, model: LlamaForCausalLM) -> None:
    """A Llama with fp32 tensors and a byte-level BPE of single bytes, in llama.cpp's names and layout."""
    import gguf
    from tokenizers.pre_tokenizers import ByteLevel

    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, "ab", *(f"<extra{i}>" for i in range(config.vocab_size - len(alphabet) - 1))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(len(tokens) - 2)
    writer.add_eos_token_id(len(tokens) - 1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        writer.add_tensor(names.get_name(name, (".weight",)), interleaved(name, tensor, config).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleaved(name: str, tensor: torch.Tensor, config: LlamaConfig) -> torch.Tensor:
    """llama.cpp's order of rotary dimensions in q and k."""
    if "q_proj" not in name and "k_proj" not in name:
        return tensor.contiguous()
    heads = config.num_attention_heads
    return tensor.reshape(heads, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape).contiguous()
