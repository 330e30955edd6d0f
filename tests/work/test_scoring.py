"""Scores are lm-eval's, whatever shares a forward pass, and however it is batched."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, product
from typing import Any

import numpy as np
import pytest
import torch

from portllm.errors import StageError
from portllm.work import head, scoring
from portllm.work.head import Head, body
from portllm.work.requests import RequestSet
from portllm.work.scoring import HELD, batches, loglikelihoods, plan_families, plan_rows, rope_turn
from tests.work.toy_requests import VOCABULARY, at_most, drawn, request_set, tiny

pytestmark = pytest.mark.usefixtures("one_thread")


def plain(model: Any, pairs: Sequence[tuple[list[int], list[int]]], window: int = 64) -> tuple[list[float], list[bool]]:
    """Each pair on its own, a log-softmax over all logits."""
    scores, greedy = [], []
    for context, continuation in pairs:
        ids = torch.tensor((context + continuation)[-(window + 1) :])
        with torch.no_grad():
            logs = torch.log_softmax(model(ids[None, :-1]).logits[0].float(), dim=-1)[-len(continuation) :]
        targets = torch.tensor(continuation)
        scores.append(float(logs.gather(1, targets[:, None]).sum()))
        greedy.append(bool((logs.argmax(-1) == targets).all()))
    return scores, greedy


class Picky(torch.nn.Module):
    """An inner network that looks at the whole sequence."""

    def __init__(self, mlp: torch.nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        return self.mlp(x_BSD) + x_BSD.mean(dim=1, keepdim=True)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "gemma3", "gpt2", "phi"])
def test_the_last_layer_computes_only_where_it_is_read(kind):
    model, counted = tiny(kind), []
    layer = (model.transformer.h if kind == "gpt2" else model.model.layers)[-1]
    layer.mlp.register_forward_hook(lambda *call: counted.append(call[2].shape[:2].numel()))
    pairs = [(context, answer[:1]) for context, answer in drawn(longest=40)[::4]]
    scores = loglikelihoods(model, request_set(pairs), 4096)
    np.testing.assert_allclose(scores.loglikelihoods, plain(model, pairs)[0], atol=1e-4, rtol=0)
    assert counted[-len(pairs) - 1] == len(pairs)


def test_a_last_layer_that_mixes_positions_computes_everywhere():
    model, pairs = tiny("llama"), [(context, answer[:1]) for context, answer in drawn(longest=40)[::4]]
    model.model.layers[-1].mlp = Picky(model.model.layers[-1].mlp)
    alone = loglikelihoods(model, request_set(pairs), 1)  # no padding: the mean is over the sequence itself
    np.testing.assert_allclose(alone.loglikelihoods, plain(model, pairs)[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "kind", ["llama", "mistral", "gemma2", "gemma3", "gpt2", "gpt_neo", "phi", "granite", "cohere2"]
)
def test_scores_are_those_of_each_request_alone(kind):
    model, pairs = tiny(kind), drawn()
    expected, greedy = plain(model, pairs)
    found = loglikelihoods(model, request_set(pairs), budget=256)
    np.testing.assert_allclose(found.loglikelihoods, expected, atol=1e-4, rtol=0)
    assert found.greedy.tolist() == greedy
    assert np.std(expected) > 1 and found.truncated == 0


def test_scores_do_not_depend_on_the_budget():
    model, found = tiny("llama"), request_set(drawn())
    small, large = (loglikelihoods(model, found, budget).loglikelihoods for budget in (1, 100_000))
    np.testing.assert_allclose(small, large, atol=1e-5, rtol=0)


def test_greedy_continuations_are_recognised():
    model = tiny("llama")
    with torch.no_grad():
        best = [int(model(torch.tensor([[5, 6, 7]])).logits[0, -1].argmax())]
        best.append(int(model(torch.tensor([[5, 6, 7, *best]])).logits[0, -1].argmax()))
    found = loglikelihoods(model, request_set([([5, 6, 7], best), ([5, 6, 7], [best[0], best[1] ^ 1])]), 64)
    assert found.greedy.tolist() == [True, False]


def test_contexts_are_cut_from_the_left_and_counted():
    model = tiny("llama")
    pairs = [([*range(3, 90)], [4, 5]), ([5, 6], [7])]
    found = loglikelihoods(model, request_set(pairs), budget=256)
    np.testing.assert_allclose(found.loglikelihoods, plain(model, pairs)[0], atol=1e-4, rtol=0)
    assert found.truncated == 1
    with pytest.raises(StageError, match="exceeds the model's window of 64 tokens"):
        loglikelihoods(model, request_set([([3], [4] * 70)]), budget=256)


def test_inputs_that_begin_another_share_its_forward_pass():
    shared = [([3, 4, 5], [6]), ([3, 4, 5], [7]), ([3, 4, 5], [8, 9]), ([3, 4, 5, 8], [10]), ([3, 4], [9])]
    pairs = [*shared, ([4, 5], [6])]
    rows, _ = plan_rows(request_set(pairs), window=64)
    assert [row.ids.tolist() for row in rows] == [[4, 5], [3, 4, 5, 8]]
    assert [sorted(r[0] for r in row.reads) for row in rows] == [[5], [0, 1, 2, 3, 4]]


def test_a_batch_stays_within_the_budget_and_never_is_empty():
    lengths = sorted((len(context) for context, _ in drawn()), reverse=True)
    made = [lengths[batch] for batch in batches(lengths, budget=100)]
    assert list(chain.from_iterable(made)) == lengths
    assert all(len(batch) * batch[0] <= 100 or len(batch) == 1 for batch in made)
    assert all(len(lengths[batch]) == 1 for batch in batches(lengths, budget=1))


def test_what_rows_go_on_from_is_bounded_too():
    made = list(batches([10] * 500, budget=1000, behind=990))
    assert max(batch.stop - batch.start for batch in made) * (990 + 10) == HELD * 1000
    assert list(batches([10] * 500, budget=1000, behind=10)) == list(batches([10] * 500, budget=1000))
    assert all(batch.stop - batch.start == 1 for batch in batches([10] * 3, budget=1000, behind=10**6))


def choices(count: int = 8, header: int = 0) -> tuple[RequestSet, list[tuple[list[int], list[int]]]]:
    """Documents of four requests that begin alike, as the choices of a task do; `header` tokens begin them all."""
    shots = np.random.default_rng(9).integers(3, VOCABULARY, header).tolist()
    pairs = [([*shots, *context], continuation) for context, continuation in drawn(count, 64 - header - 8)]
    return replace(request_set(pairs), documents=np.arange(len(pairs)) // 4, doc_ids=np.arange(count)), pairs


@pytest.mark.parametrize("header", [0, 40])
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "gemma3", "gpt2"])
def test_what_choices_and_documents_share_is_forwarded_once_and_changes_no_score(kind, header, monkeypatch):
    model, (found, pairs) = tiny(kind), choices(header=header)
    seen, forward = [], body(model).forward

    def counted(*arguments, **named):
        seen.append((named["input_ids"] if "input_ids" in named else arguments[0]).numel())
        return forward(*arguments, **named)

    monkeypatch.setattr(body(model), "forward", counted)
    scores = loglikelihoods(model, found, budget=200)
    forwarded = sum(seen)
    expected, greedy = plain(model, pairs)
    np.testing.assert_allclose(scores.loglikelihoods, expected, atol=1e-4, rtol=0)
    assert scores.greedy.tolist() == greedy
    tokens = sum(len(context) + len(continuation) - 1 for context, continuation in pairs)
    kept = header and kind in ("llama", "gpt2")  # the others' windows of 8 tokens do not see a header whole
    assert forwarded < tokens / (3 if kept else 1.3)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [*product(("gemma3", "mistral"), ({"sliding_window": n} for n in (40, 50, 58, 64))), ("gpt2", {}), ("gpt_neo", {})],
)
def test_padding_is_counted_by_no_window_and_has_no_position(kind, changes):
    """One document has the longest stem, another the longest branches: their batch has more columns than any input."""
    rng = np.random.default_rng(1)
    shots, long, short = (rng.integers(3, VOCABULARY, n).tolist() for n in (32, 20, 2))
    pairs = [(shots + context, rng.integers(3, VOCABULARY, answer).tolist())
             for context, answer in ((long, 2), (short, 20)) for _ in range(4)]  # fmt: skip
    found = replace(request_set(pairs), documents=np.repeat([0, 1], 4), doc_ids=np.arange(2))
    model = tiny(kind, **changes)
    expected = plain(model, pairs)[0]
    np.testing.assert_allclose(loglikelihoods(model, found, 4096).loglikelihoods, expected, atol=1e-4, rtol=0)


def test_inputs_that_share_little_are_not_forwarded_in_two_parts():
    pairs = [([3, 4, *range(20, 40)], [5]), ([3, 6, *range(50, 70)], [5])]
    found = replace(request_set(pairs), documents=np.zeros(2, dtype=int))
    assert [len(family.branches) for family in plan_families(plan_rows(found, 64)[0], found)] == [0, 0]


def test_a_text_is_scored_window_by_window_after_one_token():
    model, text = tiny("llama"), np.random.default_rng(3).integers(3, VOCABULARY, 150).tolist()
    found = loglikelihoods(model, request_set([([1], text)], output_type="loglikelihood_rolling"), 256)
    windows = [([1], text[:64]), ([text[63]], text[64:128]), (text[85:128], text[128:])]
    assert found.loglikelihoods[0] == pytest.approx(sum(plain(model, windows)[0]), abs=1e-3)
    assert loglikelihoods(model, request_set([([1], [])], output_type="loglikelihood_rolling"), 9).loglikelihoods == [0]


def test_a_batch_that_does_not_fit_into_memory_is_halved_and_counted(monkeypatch):
    model, (found, _) = tiny("llama"), choices()
    whole, forward = loglikelihoods(model, found, 10_000), body(model).forward

    monkeypatch.setattr(body(model), "forward", at_most(6, forward))
    halves = loglikelihoods(model, found, 10_000)
    assert (whole.halved, halves.halved > 0) == (0, True)
    np.testing.assert_allclose(halves.loglikelihoods, whole.loglikelihoods, atol=1e-5, rtol=0)


def test_a_head_that_runs_out_of_memory_takes_its_positions_in_halves(monkeypatch):
    model, (found, _) = tiny("llama"), choices()
    whole, score, refused = loglikelihoods(model, found, 10_000), Head.score, []

    def small(self, hidden_PD, targets_T, at_T):
        if len(hidden_PD) > 10:
            refused.append(len(hidden_PD))
            raise RuntimeError("CUDA out of memory. Tried to allocate 1 byte")
        return score(self, hidden_PD, targets_T, at_T)

    monkeypatch.setattr(Head, "score", small)
    halves = loglikelihoods(model, found, 10_000)
    assert halves.halved == len(refused) > 1
    np.testing.assert_allclose(halves.loglikelihoods, whole.loglikelihoods, atol=1e-5, rtol=0)
    assert halves.greedy.tolist() == whole.greedy.tolist()


def test_a_header_that_memory_does_not_hold_is_given_up(monkeypatch):
    model, (found, _) = tiny("llama"), choices(header=40)
    whole, forward, refused = loglikelihoods(model, found, 200), body(model).forward, []

    def small(*arguments, **named):
        if named["use_cache"] and "attention_mask" not in named:  # the header's pass alone needs no mask
            refused.append(named["input_ids"].shape)
            raise MemoryError
        return forward(*arguments, **named)

    monkeypatch.setattr(body(model), "forward", small)
    apart = loglikelihoods(model, found, 200)
    assert refused == [(1, 40)] and (whole.halved, apart.halved) == (0, 1)
    np.testing.assert_allclose(apart.loglikelihoods, whole.loglikelihoods, atol=1e-4, rtol=0)


def test_keys_and_values_fill_a_few_budgets_at_most(monkeypatch):
    model, (found, pairs) = tiny("llama"), choices(header=50)
    forward, held = body(model).forward, []

    def watched(*arguments, **named):
        if named.get("attention_mask") is not None:
            held.append(named["attention_mask"].numel())
        return forward(*arguments, **named)

    monkeypatch.setattr(body(model), "forward", watched)
    loglikelihoods(model, found, 32)
    assert max(held) > 4 * 32
    held.clear()
    monkeypatch.setattr(scoring, "HELD", 4)
    few = loglikelihoods(model, found, 32)
    assert 2 * 50 < max(held) <= 4 * 32
    np.testing.assert_allclose(few.loglikelihoods, plain(model, pairs)[0], atol=1e-4, rtol=0)


def test_what_is_done_is_told_batch_by_batch():
    model, (found, pairs), told = tiny("llama"), choices(), []
    loglikelihoods(model, found, 100, lambda *at: told.append(at))
    assert told == sorted(told) and told[-1] == (len(pairs), len(pairs)) and len(told) > 2


def test_a_text_is_done_with_its_last_window():
    texts = [([1], np.random.default_rng(seed).integers(3, VOCABULARY, 100 * seed).tolist()) for seed in (1, 2, 3)]
    told = []
    found = request_set(texts, output_type="loglikelihood_rolling")
    loglikelihoods(tiny("llama"), found, 64, lambda *at: told.append(at))
    assert told == sorted(told) and told[0] == (0, 3) and told[-1] == (3, 3)


def test_blocks_of_the_vocabulary_change_nothing(monkeypatch):
    model, pairs = tiny("gemma2"), drawn(10)
    whole = loglikelihoods(model, request_set(pairs), 256)
    monkeypatch.setattr(head, "VOCABULARY", 10)
    monkeypatch.setattr(head, "positions_at_once", lambda device: 3)
    blocks = loglikelihoods(model, request_set(pairs), 256)
    np.testing.assert_allclose(blocks.loglikelihoods, whole.loglikelihoods, atol=1e-5, rtol=0)
    assert blocks.greedy.tolist() == whole.greedy.tolist()


def test_sums_are_made_in_fp32_for_a_bf16_model():
    model, pairs = tiny("llama").to(torch.bfloat16), drawn(10)
    found = loglikelihoods(model, request_set(pairs), 256).loglikelihoods
    expected = plain(model, pairs)[0]  # bf16 logits of batches of one: rounded elsewhere
    np.testing.assert_allclose(found, expected, atol=0.6, rtol=0.03)
    h = torch.randn(6, 32).to(torch.bfloat16)
    targets = torch.arange(6)
    with torch.inference_mode():
        logits = (h @ model.lm_head.weight.T).float()
        exact = torch.log_softmax(logits, -1)[targets, targets]
        np.testing.assert_allclose(Head(model).score(h, targets, torch.arange(len(h)))[0], exact, atol=1e-5)


@pytest.mark.parametrize("budget", [64, 2048])
def test_a_model_that_turns_its_positions_by_length_scores_each_request_as_alone(budget):
    model, (_, pairs) = tiny("phi3"), choices(header=0)
    pairs = [*pairs, *drawn(8, longest=30), *((context[:9], answer) for context, answer in pairs[:4])]
    lengths = [len(context) + len(answer) - 1 for context, answer in pairs]
    assert min(lengths) < 16 < max(lengths)
    assert rope_turn(model) == 16 and rope_turn(tiny("llama")) is None
    scores = loglikelihoods(model, request_set(pairs), budget)
    np.testing.assert_allclose(scores.loglikelihoods, plain(model, pairs)[0], atol=1e-4, rtol=0)


def test_weights_that_are_not_finite_are_an_error_and_not_a_score():
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(StageError, match="the score of document 0 is nan"):
        loglikelihoods(model, request_set(drawn(1)), 64)


def test_a_recurrent_model_shares_no_pass_and_has_each_request_s_own_score():
    model = tiny("lfm2")
    shots = np.random.default_rng(9).integers(3, VOCABULARY, 34).tolist()
    pairs = [(shots + context, continuation) for context, continuation in drawn(6, longest=20)]
    found = loglikelihoods(model, request_set(pairs), 256)
    np.testing.assert_allclose(found.loglikelihoods, plain(model, pairs)[0], atol=1e-4, rtol=0)
