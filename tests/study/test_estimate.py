"""What a plan reckons with, beside what a ledger counts and what was measured."""

from dataclasses import replace

import pytest

from portllm.formats.tensors import model_tensors
from portllm.resolve.shapes import from_config, from_tensors, load_config, shipped
from portllm.study import estimate
from portllm.study.facts import ModelFacts, Shape
from portllm.study.recipes import Base, Finetune, Lora, Optimization, Slice, Update
from portllm.study.resources import Layout
from portllm.study.steps import Step
from tests.study.worlds import facts, plan
from tests.work.checkpoints import save_model

MOVES = Optimization(learning_rate=1e-4, batch=8, seed=0)
HALF = replace(MOVES, dtype="bfloat16")
FULL = Update("full", tokens=10**9, sequence_length=256, optimization=MOVES)
LORA = replace(FULL, method="lora", lora=Lora(4, 8))
SHAPE = Shape(parameters=10**6, linear=((100, 100),) * 8, layers=2, hidden=100, vocabulary=1000, norms=500)


def memory(recipe, layout=Layout(), shape=SHAPE):
    return estimate.memory(Step("", type(recipe).__name__.lower(), "", recipe, {}, layout), shape)


def flops(recipe, shape):
    """Of a step, from its cost."""
    step = Step("", "update", "", recipe, {}, Layout(), {"model": "m"})
    known = facts(models={"m": ModelFacts(None, None, shape=shape)})
    return (estimate.cost(step, known, {}).device_s - estimate.STEP_SECONDS) * estimate.CPU_FLOPS


@pytest.mark.real
@pytest.mark.parametrize("recipe", [FULL, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["llama", "mistral"], ids=["untied", "tied"])
def test_an_update_is_reckoned_with_the_arithmetic_that_its_ledger_counts(tmp_path, family, recipe):
    from transformers import AutoModelForCausalLM

    from portllm.work import ledger
    from portllm.work.lora import attach

    root = save_model(tmp_path / "m", family)
    sizes = {name: entry.shape for name, entry in model_tensors(root).items()}
    shape = from_tensors(sizes, load_config(root / "config.json"), "float32")
    assert shape.tied == (family == "mistral")
    model = AutoModelForCausalLM.from_pretrained(root)
    if recipe.lora:
        attach(model, recipe.lora, seed=0)
    counted = ledger.flops(model, recipe.tokens, recipe.tokens)
    assert flops(recipe, shape) == pytest.approx(counted, rel=0.02)  # norms


@pytest.mark.parametrize("recipe", [FULL, LORA], ids=["full", "lora"])
def test_replayed_tokens_cost_what_others_cost(recipe):
    half = replace(recipe, tokens=recipe.tokens // 2, replay=(Slice(0, recipe.tokens - recipe.tokens // 2),))
    assert flops(half, SHAPE) == flops(recipe, SHAPE)


def test_patches_and_scores_are_reckoned_without_embedding_and_head():
    def seconds(vocabulary, tied):
        beside = vocabulary * 16 * (1 if tied else 2)
        shape = replace(facts().models["m"].shape, parameters=10**9 + beside, vocabulary=vocabulary, tied=tied)
        found = plan(models={"m": replace(facts().models["m"], shape=shape)})
        stages = estimate.by_stage(found)
        return [stages[name].device_s for name in ("finetune", "evaluate")]

    narrow = pytest.approx(seconds(10**6, tied=True))
    assert seconds(2 * 10**6, tied=True) == narrow
    assert seconds(10**6, tied=False) == narrow


def test_a_tied_head_that_is_stored_too_is_no_weight_of_its_own():
    sizes = {"model.embed_tokens.weight": (30, 4), "model.norm.weight": (4,), "lm_head.weight": (30, 4)}
    config = {"vocab_size": 30, "hidden_size": 4}
    tied = from_tensors(sizes, config | {"tie_word_embeddings": True}, "float32")
    untied = from_tensors(sizes, config, "float32")
    assert (tied.parameters, tied.tied, tied.body) == (124, True, 4)
    assert (untied.parameters, untied.tied, untied.body) == (244, False, 4)


@pytest.mark.parametrize("gpus, workers, charged", [(0, 1, 1), (0, 4, 4), (1, 4, 4), (2, 1, 2), (4, 2, 8)])
def test_a_step_is_charged_for_the_devices_its_record_counts(gpus, workers, charged):
    layout = Layout(workers=workers, gpus=gpus)
    assert layout.devices == charged
    step = Step("", "update", "", FULL, {}, layout, {"model": "m"})
    known = facts(models={"m": ModelFacts(None, None, shape=SHAPE)})
    speed = (estimate.GPU_FLOPS if gpus else estimate.CPU_FLOPS) * workers  # a rank computes on one GPU
    wall = estimate.STEP_SECONDS + flops(FULL, SHAPE) / speed
    assert estimate.cost(step, known, {}).device_s == pytest.approx(wall * charged)


def test_a_full_update_holds_its_version_beside_the_weights_that_train():
    base = Base("init", optimization=MOVES, tokens=10**9, sequence_length=256)
    assert memory(FULL) - memory(base) == 4 * SHAPE.parameters


def test_a_lora_shares_the_weights_only_where_they_begin_well():
    half = replace(SHAPE, storage="bfloat16")
    twice = memory(replace(LORA, optimization=HALF), shape=half) - memory(replace(LORA, optimization=HALF))
    assert twice == 2 * SHAPE.parameters
    assert memory(LORA) - memory(LORA, shape=half) == 4 * SHAPE.parameters


def test_a_full_training_holds_the_sum_of_the_head_s_gradient():
    wide = replace(SHAPE, hidden=200)
    assert memory(FULL, shape=wide) - memory(FULL) == 4 * 100 * 1000
    both = replace(FULL, optimization=HALF)
    assert memory(both, shape=wide) - memory(both) == (4 + 2) * 100 * 1000
    assert memory(LORA, shape=wide) == memory(LORA)


def test_half_precision_needs_masters_and_norms_in_fp32():
    half, bare = replace(LORA, optimization=HALF), replace(SHAPE, norms=0)
    assert memory(half) - memory(half, shape=bare) == int(estimate.HEAP * 2048 * 4 * 500)
    assert memory(LORA) == memory(LORA, shape=bare)
    sizes = [memory(replace(FULL, optimization=moves), Layout(zero=zero)) for moves, zero in ((MOVES, 0), (MOVES, 1))]
    assert sizes[1] - sizes[0] == 4 * SHAPE.parameters  # ZeRO keeps masters of fp32 weights too


def test_a_forward_pass_holds_no_more_than_a_rank_s_share_of_a_batch():
    short = replace(LORA, optimization=replace(MOVES, batch=4))
    assert memory(short) < memory(LORA) == memory(replace(LORA, optimization=replace(MOVES, batch=80)))
    assert memory(LORA, Layout(workers=2)) == memory(short)
    patch = Finetune(Lora(4, 8), MOVES)
    assert memory(patch) < memory(replace(patch, optimization=replace(MOVES, batch=16)))


def test_the_memory_of_a_gemma_update_is_that_measured_to_a_tenth():
    shape = from_config(load_config(shipped("gemma-3-270m")), "bfloat16")
    assert memory(replace(FULL, method="lora", lora=Lora(8, 16), optimization=HALF), shape=shape) == pytest.approx(
        3.87e9, rel=0.1
    )
