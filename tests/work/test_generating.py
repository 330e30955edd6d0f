"""Generated texts are those of each prompt alone, whatever shares a batch and however it is cut."""

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from portllm.errors import StageError
from portllm.work import generating, kv_cache
from portllm.work.generating import generate
from portllm.work.head import body
from portllm.work.scoring import loglikelihoods
from tests.work.toy_requests import at_most, drawn, request_set, tiny

pytestmark = pytest.mark.usefixtures("one_thread")


class Words:
    """A tokenizer whose token n is the text "<n>"."""

    eos_token_id = 2

    def decode(self, ids, skip_special_tokens=False):
        ids = [ids] if isinstance(ids, int) else ids
        return "".join(f"<{i}>" for i in ids if not (skip_special_tokens and i <= 2))


def generation(**arguments) -> dict[str, Any]:
    return {"generation": {"until": [], "do_sample": False, "max_gen_toks": 12} | arguments}


def prompts(count: int = 9) -> list[tuple[list[int], list[int]]]:
    return [(context, []) for context, _ in drawn(count, longest=30)[::4]]


def alone(model: Any, context: list[int], tokens: int = 12) -> list[int]:
    """Greedy decoding by transformers, one prompt, no padding."""
    made = model.generate(torch.tensor([context]), max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return made[0, len(context) :].tolist()


def test_generation_that_does_not_fit_into_memory_is_halved_and_counted(monkeypatch):
    model, asked = tiny("llama"), request_set(prompts(), **generation())
    whole = generate(model, Words(), asked, 10_000)
    monkeypatch.setattr(body(model), "forward", at_most(2, body(model).forward))
    halves = generate(model, Words(), asked, 10_000)
    assert halves.texts == whole.texts and (whole.halved, halves.halved > 1) == (0, True)
    monkeypatch.setattr(body(model), "forward", at_most(0, body(model).forward))
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        generate(model, Words(), asked, 10_000)


@pytest.mark.parametrize("rows", [9, 2])
def test_texts_that_have_ended_are_told_also_where_batches_are_halved(rows, monkeypatch):
    model, told = tiny("llama"), []
    monkeypatch.setattr(body(model), "forward", at_most(rows, body(model).forward))
    texts = generate(model, Words(), request_set(prompts(), **generation()), 10_000, lambda *at: told.append(at)).texts
    ends = len({len(text) for text in texts})
    assert told == sorted(told) and told[-1] == (9, 9) and len(told) >= min(ends, 2)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "gemma3", "gpt2", "gpt_neo", "cohere2"])
def test_generated_text_is_that_of_each_prompt_alone(kind):
    model = tiny(kind)
    made = generate(model, Words(), request_set(prompts(), **generation()), budget=100)
    assert made.texts == [Words().decode(alone(model, p), True) for p, _ in prompts()]
    assert (made.truncated, made.halved) == (0, 0) and len(set(made.texts)) > 3


@pytest.mark.parametrize("gaps", [0, 32])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("gpt2", {}),
        *product(("mistral", "gemma2", "gemma3"), ({}, {"sliding_window": 32})),
    ],
)
def test_guessed_tokens_save_passes_and_change_no_text(kind, changes, gaps, monkeypatch):
    model, passes = tiny(kind, **changes), []
    again = [(context[:6] * 3, []) for context, _ in prompts(6)]
    expected = [Words().decode(alone(model, p, 40), True) for p, _ in again]
    forward = body(model).forward
    monkeypatch.setattr(body(model), "forward", lambda *a, **named: passes.append(named) or forward(*a, **named))
    monkeypatch.setattr(generating, "GAPS", gaps)
    made = generate(model, Words(), request_set(again, **generation(max_gen_toks=40)), budget=1000)
    assert made.texts == expected and (kind == "mistral" or len(passes) < 35)  # its texts hardly repeat themselves
    assert any(named["input_ids"].shape[1] > 1 for named in passes[1:])


@pytest.mark.parametrize("kind", ["llama", "gemma3", "lfm2"])
def test_rows_leave_their_batch_at_a_stop_sequence_and_are_cut_there(kind):
    model = tiny(kind)
    whole = [Words().decode(alone(model, p), True) for p, _ in prompts()]
    longest = max(range(len(whole)), key=lambda n: len(whole[n]))
    stop = whole[longest][6:14]  # across tokens
    texts = generate(model, Words(), request_set(prompts(), **generation(until=[stop])), budget=1000).texts
    assert texts == [text.split(stop)[0] for text in whole] and texts[longest] != whole[longest]


def test_prompts_leave_room_for_what_is_generated():
    model = tiny("llama")
    long = [([*range(3, 83)], [])]
    made = generate(model, Words(), request_set(long, **generation()), budget=100)
    assert made.truncated == 1 and made.texts == [Words().decode(alone(model, [*range(3, 83)][-52:]), True)]
    with pytest.raises(StageError, match="generates up to 64 tokens, and the model's window of 64 leaves no room"):
        generate(model, Words(), request_set(long, **generation(max_gen_toks=64)), budget=100)


def test_weights_that_are_not_finite_are_an_error_and_not_a_text():
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(StageError, match="logits are not finite"):
        generate(model, Words(), request_set(prompts(1), **generation()), budget=100)


@pytest.mark.parametrize("arguments", [{"do_sample": True, "temperature": 0.7}, {"num_beams": 4}])
def test_only_greedy_generation_is_accepted(arguments):
    with pytest.raises(StageError, match="only greedy generation is supported"):
        generate(tiny("llama"), Words(), request_set(prompts(1), **generation(**arguments)), budget=100)


def test_settings_that_move_no_greedy_choice_change_no_text():
    model, plain_ones = tiny("llama"), {"num_beams": 1, "repetition_penalty": 1.0, "min_length": 0, "length_penalty": 2}
    found = [
        generate(model, Words(), request_set(prompts(3), **generation(**given)), budget=100).texts
        for given in ({}, plain_ones)
    ]
    assert found[0] == found[1] and any(found[0])


def test_a_model_that_asks_for_a_repetition_penalty_is_refused():
    model = tiny("llama")
    model.generation_config.repetition_penalty = 1.3
    with pytest.raises(StageError, match="sets repetition_penalty"):
        generate(model, Words(), request_set(prompts(1), **generation()), budget=100)


def test_an_empty_stop_sequence_ends_a_text_after_its_first_token():
    model = tiny("llama")
    texts = generate(model, Words(), request_set(prompts(3), **generation(until=[""])), budget=100).texts
    assert texts == [Words().decode(alone(model, p, 1), True) for p, _ in prompts(3)] and any(texts)


def test_a_prompt_without_a_token_is_refused():
    with pytest.raises(StageError, match="the prompt of document 1 has no token"):
        generate(tiny("llama"), Words(), request_set([([5], []), ([], [])], **generation()), budget=100)


def test_a_long_text_is_that_of_its_prompt_alone_whatever_room_there_was(monkeypatch):
    monkeypatch.setattr(kv_cache, "ROOM", 1)
    model = tiny("llama")
    made = generate(model, Words(), request_set(prompts(4), **generation(max_gen_toks=30)), budget=40)
    assert made.texts == [Words().decode(alone(model, p, 30), True) for p, _ in prompts(4)]


def test_a_model_with_a_cache_of_its_own_kind_is_refused_and_scored_all_the_same():
    model = tiny("minimax")
    with pytest.raises(StageError, match="`minimax` keeps no keys and values between passes"):
        generate(model, Words(), request_set(prompts(), **generation()), budget=100)
    assert np.isfinite(loglikelihoods(model, request_set(drawn(4)), 64).loglikelihoods).all()
