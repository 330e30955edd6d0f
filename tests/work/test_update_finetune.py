"""Stages `update` and `finetune` on a toy lineage: deltas and patches that PEFT loads, from the seed alone."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from portllm.errors import StageError
from portllm.study.generators import QUESTIONS, rows
from portllm.study.recipes import Base, Corpus, Finetune, Lora, Optimization, Slice, Text, Update
from portllm.study.resources import Layout
from portllm.work.base import base
from portllm.work.context import RunContext, Summary
from portllm.work.corpora import corpus
from portllm.work.finetune import finetune
from portllm.work.lora import attach, check_saved, private_copy, require_applicable
from portllm.work.provenance import altered
from portllm.work.resident import Resident
from portllm.work.update import update
from portllm.work.versions import Versions, version_digest
from tests.work.checkpoints import save_model

pytestmark = pytest.mark.real

SHAPE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip
MOVES = Optimization(learning_rate=5e-3, batch=8, seed=1)
LORA = Lora(4, 8)
UPDATE = Update("lora", tokens=1600, sequence_length=32, optimization=MOVES, lora=LORA)
FULL = replace(UPDATE, method="full", lora=None)
FINETUNE = Finetune(LORA, MOVES, steps=6)
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


MOE = {
    "vocab_size": 120, "hidden_size": 32, "intermediate_size": 16, "moe_intermediate_size": 16, "num_experts": 4,
    "num_experts_per_tok": 2, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


def context(scratch: Path, layout: Layout | None = None) -> RunContext:
    return RunContext(scratch, Versions(), layout or Layout(), log=lambda line: None)


def run(stage: Any, recipe: Any, inputs: Mapping[str, Path], out: Path, within: RunContext | None = None) -> Summary:
    out.mkdir(parents=True, exist_ok=True)
    return dict(stage(recipe, inputs, out, within or context(out.parent / "scratch")))


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A pretrained root, a corpus and training examples for it."""
    where = tmp_path_factory.mktemp("toy")
    text = Text(generator="reviews", documents=400, seed=3)
    recipe = Base("init", storage="bfloat16", model_type="mistral", config=SHAPE, text=text, tokens=4800,
                  sequence_length=32, optimization=MOVES)  # fmt: skip
    run(base, recipe, {}, where / "root")
    diaries = Corpus(Text(generator="diaries", documents=300, seed=5))
    run(corpus, diaries, {"tokenizer": where / "root"}, where / "corpus")
    save_examples(where / "root", where / "examples")
    return {name: where / name for name in ("root", "corpus", "examples")}


def save_examples(root: Path, out: Path, count: int = 48) -> None:
    """What stage `requests` writes for training."""
    out.mkdir()
    tokenizer, answers = AutoTokenizer.from_pretrained(root), QUESTIONS["toy_mood"][1]
    spans, first = [], []
    for row in rows("toy_mood", count, seed=2):
        asked = f"review : {row['text']} question : {row['question']} answer :"
        first.append(len(tokenizer(asked)["input_ids"]))
        spans.append(tokenizer(f"{asked} {answers[row['label']]}")["input_ids"])
    np.save(out / "tokens.npy", np.array([t for span in spans for t in span], np.uint32))
    np.save(out / "offsets.npy", np.cumsum([0, *map(len, spans)]))
    np.save(out / "answers.npy", np.array(first))
    np.save(out / "doc_ids.npy", np.arange(count) + 1000)
    (out / "meta.json").write_text("{}")


def version(inputs: Mapping[str, Path]) -> dict[str, Path]:
    return {role: path for role, path in inputs.items() if role in ("root", "corpus")}


def tuning(inputs: Mapping[str, Path]) -> dict[str, Path]:
    return {role: path for role, path in inputs.items() if role in ("root", "examples")}


# --------------------------------------------------------------------------------------------------------------- update


def test_a_lora_update_is_a_delta_and_the_next_one_starts_from_its_bits(toy: dict[str, Path], tmp_path: Path) -> None:
    ledger = run(update, UPDATE, version(toy), tmp_path / "delta1")
    assert ledger["tokens"] == 1600
    assert ledger["trainable_parameters"] < ledger["total_parameters"] / 4
    facts = json.loads((tmp_path / "delta1" / "version.json").read_text())
    inputs = {"root": toy["root"], "delta1": tmp_path / "delta1"}
    zero = version_digest({"root": toy["root"]})
    assert facts == {"method": "lora", "storage": "bfloat16", "sha256": version_digest(inputs), "lineage": [zero]}

    second = replace(UPDATE, start=1600)
    within = context(tmp_path / "scratch")
    run(update, second, inputs | {"corpus": toy["corpus"]}, tmp_path / "delta2", within)
    opened = within.open(inputs, "float32")
    assert version_digest({"root": opened.path}) == facts["sha256"]
    third = inputs | {"delta2": tmp_path / "delta2"}
    later = json.loads((tmp_path / "delta2" / "version.json").read_text())
    assert (later["sha256"], later["lineage"]) == (version_digest(third), [zero, facts["sha256"]])
    seen = [json.loads((tmp_path / d / "documents.rank0.json").read_text()) for d in ("delta1", "delta2")]
    assert {d for step in seen[0] for d in step} != {d for step in seen[1] for d in step}


def test_a_full_update_is_a_complete_model_in_the_storage_dtype(toy: dict[str, Path], tmp_path: Path) -> None:
    ledger = run(update, FULL, version(toy), tmp_path / "full")
    assert ledger["trainable_parameters"] == ledger["total_parameters"]
    before, after = (load_file(path / "model.safetensors") for path in (toy["root"], tmp_path / "full"))
    assert {n: (t.dtype, t.shape) for n, t in after.items()} == {n: (t.dtype, t.shape) for n, t in before.items()}
    assert all(not torch.equal(before[name], after[name]) for name in before)
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "full" / name).read_bytes() == (toy["root"] / name).read_bytes()
    facts = json.loads((tmp_path / "full" / "version.json").read_text())
    assert facts["sha256"] == version_digest({"root": tmp_path / "full"})
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "full").dtype == torch.bfloat16


STILL = replace(MOVES, learning_rate=1e-30, dtype="bfloat16")


def test_a_full_update_begins_with_each_tensor_s_own_bits_and_keeps_its_dtype(
    toy: dict[str, Path], tmp_path: Path
) -> None:
    root = shutil.copytree(toy["root"], tmp_path / "root")
    before = load_file(root / "model.safetensors")
    before = {name: t.float() * 1.0001 if "norm" in name or "q_proj" in name else t for name, t in before.items()}
    save_file(before, root / "model.safetensors", {"format": "pt"})
    run(update, replace(FULL, optimization=STILL), {"root": root, "corpus": toy["corpus"]}, tmp_path / "full")
    after = load_file(tmp_path / "full" / "model.safetensors")
    assert {t.dtype for t in before.values()} == {torch.float32, torch.bfloat16}
    assert before.keys() == after.keys()
    assert all(before[n].dtype == after[n].dtype and torch.equal(before[n], after[n]) for n in before)


def test_a_full_update_keeps_the_bits_of_what_transformers_fuses_on_loading(
    toy: dict[str, Path], tmp_path: Path
) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    root = shutil.copytree(toy["root"], tmp_path / "root")
    shape = {**MOE, "vocab_size": json.loads((root / "config.json").read_text())["vocab_size"]}
    MixtralForCausalLM(MixtralConfig(**shape, num_local_experts=2)).save_pretrained(root)
    before = load_file(root / "model.safetensors")
    assert any(".experts.1.w1." in name for name in before) and {t.dtype for t in before.values()} == {torch.float32}
    run(update, replace(FULL, optimization=STILL), {"root": root, "corpus": toy["corpus"]}, tmp_path / "full")
    after = load_file(tmp_path / "full" / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_warm_start_in_bfloat16_begins_with_the_old_patch_s_bits(toy: dict[str, Path], tmp_path: Path) -> None:
    run(finetune, FINETUNE, tuning(toy), tmp_path / "cold")
    inputs = tuning(toy) | {"patch1": tmp_path / "cold"}
    run(finetune, replace(FINETUNE, optimization=STILL), inputs, tmp_path / "warm")
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("cold", "warm"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 10**6}, "the corpus has"),
        ({"sequence_length": 128}, r"model reads \(64 tokens\)"),
        ({"lora": Lora(4, 8, ("q_proj", "qkv"))}, "`qkv` matches no module"),
        ({"lora": Lora(4, 8, r".*\.nothing")}, "nothing"),
    ],
)
def test_an_update_that_cannot_be_is_refused(
    change: dict[str, Any], message: str, toy: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(StageError, match=message):
        run(update, replace(UPDATE, **change), version(toy), tmp_path / "out")


# ------------------------------------------------------------------------------------------------------------- finetune


def test_a_patch_is_a_plain_peft_adapter_with_provenance(toy: dict[str, Path], tmp_path: Path) -> None:
    ledger = run(finetune, FINETUNE, tuning(toy), tmp_path / "patch")
    assert (ledger["steps"], ledger["examples"]) == (6, 48)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(toy["root"]), tmp_path / "patch")
    factors = {n: p for n, p in loaded.named_parameters() if "lora_" in n}
    assert len(factors) == 2 * len(TARGETS) * SHAPE["num_hidden_layers"]
    assert all(p.abs().sum() > 0 for p in factors.values())
    assert sum(p.numel() for p in factors.values()) == ledger["trainable_parameters"]
    saved = load_file(tmp_path / "patch" / "adapter_model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.float32}
    settings = json.loads((tmp_path / "patch" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == ""
    assert settings["target_modules"] == sorted(settings["target_modules"])
    assert {name.rsplit(".", 1)[-1] for name in settings["target_modules"]} == set(TARGETS)
    texts = [f.read_text() for f in (tmp_path / "patch").glob("*.json")]
    assert not any(str(place) in text for text in texts for place in (toy["root"].parent, tmp_path))
    provenance = json.loads((tmp_path / "patch" / "provenance.json").read_text())
    assert provenance["data"]["examples"] == 48
    assert provenance["source"] == {"sha256": version_digest({"root": toy["root"]}), "lineage": []}
    assert provenance["metrics"]["steps"] == 6
    assert altered(tmp_path / "patch") == []
    assert "library_name: peft" in (tmp_path / "patch" / "README.md").read_text()
    assert provenance["recipe"]["lora"] == {"rank": 4, "alpha": 8}
    assert set(provenance["libraries"]) == {"torch", "transformers", "peft", "deepspeed"}


def test_a_warm_start_begins_where_the_old_patch_is_and_takes_a_share_of_the_steps(
    toy: dict[str, Path], tmp_path: Path
) -> None:
    recipe = replace(FINETUNE, steps=60, optimization=replace(MOVES, learning_rate=3e-2))
    cold = run(finetune, recipe, tuning(toy), tmp_path / "cold")
    inputs = tuning(toy) | {"patch1": tmp_path / "cold"}
    warm = run(finetune, replace(recipe, share=0.25), inputs, tmp_path / "warm")
    assert (cold["steps"], warm["steps"]) == (60, 15)
    learned = cold["loss_first"] - cold["loss_last"]
    assert learned > 0.1 and warm["loss_first"] < cold["loss_first"] - learned / 2
    assert warm["trainable_parameters"] == cold["trainable_parameters"]
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("cold", "warm"))
    assert before.keys() == after.keys() and all(not torch.equal(before[name], after[name]) for name in before)


def test_replay_mixes_the_sequences_of_older_corpora_and_names_their_documents(
    toy: dict[str, Path], tmp_path: Path
) -> None:
    reviews = Corpus(Text(generator="reviews", documents=300, seed=6))
    run(corpus, reviews, {"tokenizer": toy["root"]}, tmp_path / "reviews")
    recipe = replace(UPDATE, tokens=1216, replay=(Slice(320, 384),))
    ledger = run(update, recipe, version(toy) | {"replay1": tmp_path / "reviews"}, tmp_path / "out")
    assert (ledger["tokens"], ledger["examples"]) == (1600, 50)
    steps = json.loads((tmp_path / "out" / "documents.rank0.json").read_text())
    kinds = [{name.partition(":")[0] for name in documents} for documents in steps]
    assert sum(len(kind) == 2 for kind in kinds) > 3  # both in most batches, not one after the other
    rows_of = np.load(tmp_path / "reviews" / "rows.npy")
    replayed = {int(name.partition(":")[2]) for names in steps for name in names if name.startswith("replay1:")}
    assert replayed < set(rows_of.tolist()) and len(replayed) > 10


def test_epochs_become_whole_steps(toy: dict[str, Path], tmp_path: Path) -> None:
    ledger = run(finetune, replace(FINETUNE, steps=None, epochs=0.5), tuning(toy), tmp_path / "patch")
    assert ledger["steps"] == 3
    seen = [d for step in json.loads((tmp_path / "patch" / "documents.rank0.json").read_text()) for d in step]
    assert len(set(seen)) == 24
    assert min(seen) >= 1000


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_resident_model_is_as_it_was_after_a_training(dtype: Any, toy: dict[str, Path], tmp_path: Path) -> None:
    within = context(tmp_path / "scratch")
    before = {n: p.clone() for n, p in within.open(tuning(toy), dtype).model.named_parameters()}
    recipe = replace(FINETUNE, optimization=replace(MOVES, dtype=dtype))
    run(finetune, recipe, tuning(toy), tmp_path / "patch", within)
    run(update, replace(FULL, optimization=recipe.optimization), version(toy), tmp_path / "full", within)
    assert within.open(tuning(toy), dtype).untouched()
    assert within.versions.loads == 1
    after = dict(within.open(tuning(toy), dtype).model.named_parameters())
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_a_training_that_comes_sixth_equals_one_in_a_fresh_process(toy: dict[str, Path], tmp_path: Path) -> None:
    within = context(tmp_path / "scratch")
    for number in range(4):
        run(finetune, replace(FINETUNE, steps=1 + number), tuning(toy), tmp_path / str(number), within)
    run(update, FULL, version(toy), tmp_path / "full", context(tmp_path / "scratch"))
    torch.rand(7)
    run(finetune, FINETUNE, tuning(toy), tmp_path / "sixth", within)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    arguments = [str(toy["root"]), str(toy["examples"]), str(tmp_path / "fresh")]
    subprocess.run([sys.executable, __file__, *arguments], check=True, env=environment)
    for name in ("adapter_model.safetensors", "adapter_config.json", "README.md"):
        assert (tmp_path / "sixth" / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes()


def test_the_seed_alone_draws_the_lora(tmp_path: Path) -> None:
    def factor(seed: int) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(root)
        adapted = attach(model, LORA, seed)
        return next(p for n, p in adapted.named_parameters() if "lora_A" in n)

    root = save_model(tmp_path / "root", "llama")
    first = factor(1)
    torch.rand(5)
    assert torch.equal(first, factor(1))
    assert not torch.equal(first, factor(2))


def test_conv1d_models_are_patched_too(tmp_path: Path) -> None:
    root = save_model(tmp_path / "gpt2", "gpt2")
    save_random_examples(tmp_path / "examples")
    recipe = replace(FINETUNE, lora=Lora(4, 8, ("c_attn",)), steps=2)
    ledger = run(finetune, recipe, {"root": root, "examples": tmp_path / "examples"}, tmp_path / "patch")
    assert ledger["loss_first"] > 0
    assert json.loads((tmp_path / "patch" / "adapter_config.json").read_text())["fan_in_fan_out"] is True


def save_random_examples(out: Path, longest: int = 50) -> None:
    """Examples longer than the model reads (32 tokens) among them."""
    out.mkdir()
    lengths = np.random.default_rng(0).integers(5, longest, 12)
    np.save(out / "tokens.npy", np.random.default_rng(1).integers(3, 90, lengths.sum()).astype(np.uint32))
    np.save(out / "offsets.npy", np.cumsum([0, *lengths]))
    np.save(out / "answers.npy", lengths - 2)
    np.save(out / "doc_ids.npy", np.arange(12))
    (out / "meta.json").write_text("{}")


@pytest.mark.parametrize(
    ("tensor", "message"), [(torch.zeros(0, 4), "is empty"), (torch.tensor([1.0, torch.nan]), "not finite")]
)
def test_a_saved_tensor_that_is_empty_or_not_finite_fails_the_step(
    tensor: torch.Tensor, message: str, tmp_path: Path
) -> None:
    save_file({"a": torch.ones(2), "b": tensor}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(StageError, match=f"`b`.*{message}"):
        check_saved(tmp_path / "adapter_model.safetensors")


if __name__ == "__main__":
    root, examples, out = map(Path, sys.argv[1:])
    run(finetune, FINETUNE, {"root": root, "examples": examples}, out)


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe"])
def test_lora_on_stacks_of_experts_is_refused_before_anything_is_trained(kind: str, tmp_path: Path) -> None:
    import transformers

    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**MOE))
    model.save_pretrained(tmp_path)
    resident = Resident(tmp_path, "float32")
    with pytest.raises(
        StageError, match=r"down_proj, gate.weight, gate_up_proj: .*: \[k_proj, o_proj, q_proj, v_proj\]"
    ):
        require_applicable(attach(private_copy(resident.model, "lora"), Lora(2, 4), 0), resident)
    named = Lora(2, 4, targets=("k_proj", "o_proj", "q_proj", "v_proj"))
    require_applicable(attach(private_copy(resident.model, "lora"), named, 0), resident)


def test_lora_on_what_is_stored_under_another_name_is_refused(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(**MOE, tie_word_embeddings=True)).save_pretrained(tmp_path)
    resident = Resident(tmp_path, "float32")
    with pytest.raises(StageError, match="targets `lm_head`, and .* stores no `lm_head.weight`"):
        require_applicable(attach(private_copy(resident.model, "lora"), Lora(2, 4, targets=("lm_head",)), 0), resident)
