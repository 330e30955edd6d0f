"""The paper's model families at toy size: each updated both ways, patched, applied and evaluated by the stages."""

import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from portllm.formats.adapter import read_adapter
from portllm.formats.tensors import model_tensors
from portllm.resolve.shapes import from_tensors, load_config
from portllm.study.recipes import Corpus, Evaluate, Finetune, Lora, Optimization, Requests, Text, Update
from portllm.work.apply import apply
from portllm.work.context import RunContext
from portllm.work.corpora import corpus
from portllm.work.evaluate import evaluate
from portllm.work.finetune import finetune
from portllm.work.requests import requests
from portllm.work.resident import Resident
from portllm.work.update import update
from portllm.work.versions import Versions, materialise
from tests.toys import write_corpus, write_model, write_patch, write_tasks

pytestmark = pytest.mark.real

LM_EVAL = "0.4.13"
SHAPE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 2,
}  # fmt: skip
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 16, "patch_size": 4}  # fmt: skip
FAMILIES: dict[str, Any] = {
    "mistral": lambda words: transformers.MistralConfig(vocab_size=words, **SHAPE, sliding_window=16),
    "llama2": lambda words: transformers.LlamaConfig(vocab_size=words, **SHAPE | {"num_key_value_heads": 4}),
    "llama3.1": lambda words: transformers.LlamaConfig(vocab_size=words, **SHAPE, rope_parameters=LLAMA3),
    "llama3.2, tied": lambda words: transformers.LlamaConfig(
        vocab_size=words, **SHAPE, rope_parameters=LLAMA3, tie_word_embeddings=True
    ),
    "gemma2": lambda words: transformers.Gemma2Config(
        vocab_size=words, **SHAPE, **WINDOWS, final_logit_softcapping=2.0, attn_logit_softcapping=1.0
    ),
    "gemma3": lambda words: transformers.Gemma3TextConfig(vocab_size=words, **SHAPE, **WINDOWS),
    "gemma3 with vision": lambda words: transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(vocab_size=words, **SHAPE, **WINDOWS).to_dict(),
        vision_config=VISION, mm_tokens_per_image=4,
    ),
    "qwen3.5 with vision": lambda words: transformers.Qwen3_5Config(
        text_config=transformers.Qwen3_5TextConfig(vocab_size=words, **SHAPE).to_dict(),
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32},
    ),
    "gpt-neox": lambda words: transformers.GPTNeoXConfig(vocab_size=words, **SHAPE),
    "qwen2": lambda words: transformers.Qwen2Config(vocab_size=words, **SHAPE),
}  # fmt: skip
MOVES = Optimization(learning_rate=1e-2, batch=4, seed=1)
UPDATE = Update("lora", tokens=256, sequence_length=16, optimization=MOVES, lora=Lora(2, 4))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task, a corpus and a tokenizer."""
    root = write_tasks(tmp_path_factory.mktemp("world"), ("mood",))
    write_model(root / "tokenizer")
    write_corpus(root / "corpus.txt")
    return root


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[pytest.mark.long] if "qwen3.5" in name else []) for name in FAMILIES]
)
def test_a_family_is_updated_patched_applied_and_evaluated(family: str, world: Path, tmp_path: Path) -> None:
    run = RunContext(tmp_path / "scratch", Versions(), log=lambda line: None)

    def make(stage: Any, recipe: Any, inputs: dict[str, Path], name: str) -> Any:
        (tmp_path / name).mkdir()
        return stage(recipe, inputs, tmp_path / name, run)

    root = write_root(tmp_path / "root", family, world / "tokenizer")
    words = world / "tokenizer"  # of a directory of its own: transformers reads one beside a Qwen2 as Qwen2's
    task = {"tokenizer": words, "definition": world / "tasks", "data": world / "data" / "mood"}
    make(corpus, Corpus(Text("text")), {"tokenizer": words, "source": world / "corpus.txt"}, "corpus")
    make(requests, Requests("mood", "train", LM_EVAL), task, "examples")
    make(requests, Requests("mood", "evaluate", LM_EVAL), task, "requests")
    ported = make(
        finetune, Finetune(Lora(2, 4), MOVES, steps=8), {"root": root, "examples": tmp_path / "examples"}, "old"
    )
    assert ported["loss_last"] < ported["loss_first"]
    sizes = {name: entry.shape for name, entry in model_tensors(root).items()}
    targeted = from_tensors(sizes, load_config(root / "config.json"), "float32").linear
    assert sorted(t.stored_shape for t in read_adapter(tmp_path / "old").targets.values()) == sorted(targeted)

    versions: dict[str, dict[str, Path]] = {"t0": {"root": root}}
    text = {"corpus": tmp_path / "corpus"}
    make(update, UPDATE, versions["t0"] | text, "delta")
    versions["t1"] = {"root": root, "delta1": tmp_path / "delta"}
    full = Update("full", tokens=256, sequence_length=16, optimization=MOVES, start=256)
    make(update, full, versions["t1"] | text, "full")
    versions["t2"] = {"root": tmp_path / "full"}

    for name, inputs in versions.items():
        scored = {"requests": tmp_path / "requests", "definition": task["definition"], "data": task["data"]}
        patched = scored | {"patch1": tmp_path / "old"}
        make(evaluate, Evaluate(LM_EVAL, scales=(1.0,)), inputs | patched, f"{name}-port")
        whole = materialise(inputs["root"], [inputs["delta1"]] if "delta1" in inputs else [], run.scratch)
        apply(whole, [(tmp_path / "old", 1.0)], tmp_path / f"{name}-applied")
        make(evaluate, Evaluate(LM_EVAL), scored | {"root": tmp_path / f"{name}-applied"}, f"{name}-none")
        one, other = (pq.read_table(tmp_path / f"{name}-{arm}" / "items.parquet") for arm in ("port", "none"))
        assert one.equals(other)


def test_a_patch_named_as_the_files_are_is_the_same_patch(world: Path, tmp_path: Path) -> None:
    """transformers 4 wrote Gemma 3's names as they are stored; 5 loads them, and names patches, otherwise."""
    root = write_root(tmp_path / "root", "gemma3 with vision", world / "tokenizer")
    write_patch(tmp_path / "loaded", root)
    shutil.copytree(tmp_path / "loaded", tmp_path / "stored")
    file = tmp_path / "stored" / "adapter_model.safetensors"
    renamed = {k.replace("model.language_model.", "language_model.model."): v for k, v in load_file(file).items()}
    save_file({k: v for k, v in renamed.items() if "vision" not in k}, file)
    resident = Resident(root, "float32")
    name, stored = (
        f"{prefix}.layers.1.mlp.up_proj.weight" for prefix in ("model.language_model", "language_model.model")
    )
    found = []
    for patch in ("loaded", "stored"):
        apply(root, [(tmp_path / patch, 1.0)], tmp_path / f"{patch}-applied")
        found.append(load_file(tmp_path / f"{patch}-applied" / "model.safetensors")[stored])
        with resident.applied([(tmp_path / patch, 1.0)]) as model:
            found.append(model.get_parameter(name).detach().clone())
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert not torch.equal(found[0], resident.model.get_parameter(name))


def write_root(out: Path, family: str, tokenizer: Path) -> Path:
    """A random model of a family with the toy tokenizer."""
    words = transformers.AutoTokenizer.from_pretrained(tokenizer)
    torch.manual_seed(0)
    kind = transformers.AutoModelForImageTextToText if "vision" in family else transformers.AutoModelForCausalLM
    kind.from_config(FAMILIES[family](len(words))).save_pretrained(out)
    words.save_pretrained(out)
    return out
