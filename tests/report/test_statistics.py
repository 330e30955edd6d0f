"""Paired statistics: what they promise, on made-up scores with known answers."""

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from portllm.errors import SpecError
from portllm.report import statistics as stats

right_or_wrong = hnp.arrays(
    np.float64, st.tuples(st.integers(1, 4), st.integers(2, 60)), elements=st.sampled_from([0.0, 1.0])
)
quick = settings(max_examples=40, deadline=None)


def pair(
    seeds: int, n: int, rng: np.random.Generator, gain: float, spread: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Scores of two arms that share the documents' hardness; `spread` is the seeds' own."""
    hardness = rng.random(n)
    seeded = rng.normal(0, spread, (seeds, 1)) if spread else 0.0
    arms = (0.5 * rng.random((seeds, n)) + 0.5 * hardness < 0.5 + shift for shift in (gain + seeded, 0.0))
    a, b = (arm.astype(float) for arm in arms)
    return a, b


@quick
@given(right_or_wrong, st.integers(0, 9))
def test_a_comparison_turned_round_is_its_negative(a: np.ndarray, seed: int) -> None:
    b = np.roll(a, 1, axis=1)
    there, back = stats.compare(a, b, seed), stats.compare(b, a, seed)
    assert there.difference == pytest.approx(-back.difference)
    assert there.stderr == pytest.approx(back.stderr)
    assert (there.negative_flips, there.positive_flips) == (back.positive_flips, back.negative_flips)
    assert there.negative_flips is not None
    assert there.positive_flips is not None
    assert there.positive_flips - there.negative_flips == pytest.approx(there.difference)


@quick
@given(right_or_wrong)
def test_an_interval_holds_its_difference_and_never_has_width_zero(a: np.ndarray) -> None:
    found = stats.compare(a, a[::-1].copy() if len(a) > 1 else np.zeros_like(a))
    assert found.low is not None
    assert found.high is not None
    assert found.low <= found.difference + 1e-9
    assert found.difference - 1e-9 <= found.high
    assert found.high > found.low
    same = stats.compare(a, a)
    assert same.difference == 0
    assert same.stderr == 0
    assert same.p_value == 1
    assert same.low is not None
    assert same.low < 0 < (same.high or 0)


@quick
@given(right_or_wrong)
def test_one_seed_has_the_textbook_paired_error(a: np.ndarray) -> None:
    a, b = a[:1], np.roll(a[:1], 1, axis=1)
    d = (a - b)[0]
    assert stats.compare(a, b).stderr == pytest.approx(d.std(ddof=1) / math.sqrt(len(d)))
    assert stats.estimate(a).stderr == pytest.approx(a[0].std(ddof=1) / math.sqrt(len(d)))


def test_the_same_seed_gives_the_same_interval_and_probability() -> None:
    a, b = pair(3, 200, np.random.default_rng(0), 0.05)
    first, second = stats.compare(a, b, seed=5), stats.compare(a, b, seed=5)
    assert (first.low, first.high, first.p_value) == (second.low, second.high, second.p_value)
    assert first.probability_below(0.1) == second.probability_below(0.1)


@pytest.mark.parametrize(
    ("seeds", "n", "spread", "least"), [(1, 100, 0.0, 0.92), (3, 200, 0.0, 0.92), (3, 200, 0.03, 0.86)]
)
def test_intervals_cover_the_truth_about_as_often_as_they_say(seeds: int, n: int, spread: float, least: float) -> None:
    truth = 1 - 2 * (0.5 - 0.05) ** 2 - 0.5  # both arms: a triangular law on [0, 1] below 0.55 and 0.5
    hits = 0
    for repeat in range(120):
        a, b = pair(seeds, n, np.random.default_rng(repeat), 0.05, spread)
        found = stats.compare(a, b, repeat)
        hits += found.low <= truth <= found.high  # type: ignore[operator]
    assert least <= hits / 120 <= 0.995


def test_seeds_that_disagree_widen_the_interval() -> None:
    rng = np.random.default_rng(0)
    b = (rng.random((2, 400)) < 0.5).astype(float)
    agree = np.ones((2, 400))
    agree[:, :40] = 0
    disagree = np.ones((2, 400))
    disagree[0, :80] = 0
    one, two = stats.compare(agree, b), stats.compare(disagree, b)
    assert one.difference == pytest.approx(two.difference)
    assert two.stderr > 1.5 * one.stderr  # type: ignore[operator]
    assert two.high - two.low > 3 * (one.high - one.low)  # type: ignore[operator]


def test_more_seeds_of_the_same_kind_narrow_the_interval() -> None:
    rng = np.random.default_rng(1)
    a, b = pair(6, 300, rng, 0.05)
    few, many = stats.compare(a[:1], b[:1]), stats.compare(a, b)
    assert many.stderr < few.stderr  # type: ignore[operator]


def test_an_arm_without_seeds_meets_every_seed_of_the_other() -> None:
    a, b = pair(3, 100, np.random.default_rng(2), 0.1)
    found = stats.compare(a, b[:1])
    assert found.seeds == 3
    assert found.difference == pytest.approx(a.mean() - b[0].mean())


@pytest.mark.parametrize(("worse", "better", "p"), [(0, 0, 1.0), (0, 5, 2 / 32), (3, 10, 0.09228515625), (7, 7, 1.0)])
def test_mcnemar_is_the_exact_sign_test(worse: int, better: int, p: float) -> None:
    assert stats.mcnemar(worse, better) == stats.mcnemar(better, worse) == pytest.approx(p)


def test_mcnemar_stands_ten_thousand_documents() -> None:
    assert 0 < stats.mcnemar(4900, 5100) < 0.05 < stats.mcnemar(4950, 5050) < 1


@quick
@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_never_lowers_a_p_and_keeps_the_order(raw: list[float]) -> None:
    adjusted = stats.holm(raw)
    assert all(p <= q <= 1 for p, q in zip(raw, adjusted, strict=True))
    ranked = [q for _, q in sorted(zip(raw, adjusted, strict=True))]
    assert ranked == sorted(ranked)


@pytest.mark.parametrize("paired", [True, False])
def test_a_large_loss_stands_the_correction_for_a_thousand_tasks(paired: bool) -> None:
    a, b = pair(2, 400, np.random.default_rng(0), 0.3)
    found = (
        stats.compare(a, b)
        if paired
        else stats.unpaired(a[0].mean(keepdims=True), b[0].mean(keepdims=True), 0.01, 0.01, 400)
    )
    assert found.p_value is not None and found.p_value < 1e-6
    assert decided(found, stats.holm([found.p_value] * 1000)[0])[0] == "refit"


def test_values_of_many_levels_are_resampled_as_those_of_few() -> None:
    rng = np.random.default_rng(0)
    few = rng.integers(0, 50, 3000) / 50
    many = few + rng.normal(0, 1e-4, 3000)
    one, other = (stats.compare(x[None], np.full((1, 3000), 0.4)) for x in (few, many))
    assert (other.low, other.high) == pytest.approx((one.low, one.high), abs=5e-4)


def test_a_few_documents_without_a_difference_prove_nothing_on_any_scale() -> None:
    assert decided(stats.unpaired(np.array([1.0]), np.array([1.0]), 0.0, 0.0, n=5))[0] == "unsure"
    scores = np.tile([20.0, 80.0], 25)[None]  # BLEU
    assert stats.decide(stats.compare(scores, scores), 1.0, "1", None)[0] == "unsure"


def test_holm_on_the_textbook_case() -> None:
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


@quick
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from([0.0, 1.0])), min_size=1, max_size=20), st.randoms())
def test_the_order_of_the_documents_does_not_matter(
    documents: list[tuple[str, float]], shuffler: random.Random
) -> None:
    rows = [(name, place, value) for place, (name, value) in enumerate(documents)]
    first = stats.ordered(*map(list, zip(*rows, strict=True)))
    shuffler.shuffle(rows)
    second = stats.ordered(*map(list, zip(*rows, strict=True)))
    assert first.documents == second.documents
    assert stats.stack([first, second]).tolist() == [first.values_N.tolist()] * 2


@pytest.mark.parametrize(("other", "message"), [(["a", "c"], "not the same ones"), (["a"], "2 and 1 documents")])
def test_other_documents_are_refused(other: list[str], message: str) -> None:
    one = stats.ordered(["a", "b"], [0, 1], [1, 0])
    two = stats.ordered(other, list(range(len(other))), [1.0] * len(other))
    with pytest.raises(SpecError, match=message):
        stats.stack([one, two])


def test_retention_is_undefined_within_noise() -> None:
    rng = np.random.default_rng(3)
    none, port = (rng.random((1, 300)) < 0.5).astype(float), np.ones((1, 300))
    assert stats.retention(stats.compare(port, none), stats.compare(port, none)) == pytest.approx(1.0)
    noise = np.roll(none, 1, axis=1)
    assert stats.retention(stats.compare(port, none), stats.compare(noise, none)) is None
    assert stats.retention(None, stats.compare(port, none)) is None


def shifted(points: float, n: int = 2000) -> stats.Comparison:
    """refit − port where refit is right on `points` more documents of every hundred."""
    refit, port = np.ones((1, n)), np.ones((1, n))
    (port if points > 0 else refit)[0, : round(abs(points) / 100 * n)] = 0
    return stats.compare(refit, port)


def decided(regret: stats.Comparison | None, adjusted_p: float | None = None) -> tuple[str, str]:
    return stats.decide(regret, stats.MARGIN, "2 points", adjusted_p)


@pytest.mark.parametrize(
    ("points", "decision"), [(0, "port"), (-10, "port"), (0.5, "port"), (1.7, "unsure"), (2.2, "refit"), (10, "refit")]
)
def test_the_decision_follows_the_interval_and_the_margin(points: float, decision: str) -> None:
    assert decided(shifted(points))[0] == decision


def test_too_few_documents_are_unsure_even_without_a_difference() -> None:
    assert decided(shifted(0, n=50))[0] == "unsure"
    assert decided(shifted(0, n=2000))[0] == "port"


def test_refit_must_stand_the_correction_for_several_tasks() -> None:
    decision, why = decided(shifted(5), 0.2)
    assert decision == "unsure"
    assert "several tasks" in why
    assert decided(None)[0] == "unsure"


def test_metrics_without_items_are_compared_unpaired() -> None:
    found = stats.unpaired(np.array([0.9, 0.8]), np.array([0.5]), 0.03, 0.04, n=100)
    assert found.difference == pytest.approx(0.35)
    assert found.stderr == pytest.approx(math.hypot(0.03, 0.04, 0.05))
    assert not found.paired
    assert found.negative_flips is None
    blind = stats.unpaired(np.array([0.9]), np.array([0.5]), None, 0.04, n=100)
    assert blind.stderr is None
    assert blind.probability_below(0.1) is None
    assert decided(blind)[0] == "unsure"
