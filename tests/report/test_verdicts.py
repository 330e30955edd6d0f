"""From rows to verdicts: pairing, grouping, cost, decisions."""

from dataclasses import replace
from typing import Any

import pyarrow.compute as pc
import pytest

from portllm.errors import SpecError
from portllm.report.table import main_table, printed
from portllm.report.verdicts import Verdict, verdicts
from tests.report.made_up_study import MadeUp, N


@pytest.fixture(scope="module")
def found(made_up: MadeUp) -> dict[tuple[str, int, str], Verdict]:
    return {(v.lineage, v.t, v.task): v for v in verdicts(made_up.rows, made_up.items, made_up.steps)}


def test_every_version_lineage_and_task_has_one_verdict(found: dict[Any, Verdict]) -> None:
    assert len(found) == 2 * 3 * 2
    assert all(set(v.arms) == {"none", "port", "refit"} for v in found.values())


def test_the_lineage_that_loses_the_patch_says_refit(found: dict[Any, Verdict]) -> None:
    assert {found["full", 2, task].decision for task in ("easy", "hard")} == {"refit"}
    assert found["lora", 2, "easy"].decision == "port"
    assert found["full", 2, "easy"].sure == 0


def test_at_t_0_port_is_refit_and_nothing_is_decided(found: dict[Any, Verdict]) -> None:
    start = found["lora", 0, "hard"]
    assert start.decision is None
    assert start.arms["port"] == start.arms["refit"]
    assert start.regret is not None
    assert start.regret.difference == 0


def test_arms_are_means_over_seeds_and_comparisons_pair_them(found: dict[Any, Verdict], made_up: MadeUp) -> None:
    verdict = found["lora", 1, "hard"]
    chosen = [r for r in made_up.rows if (r["lineage"], r["t"], r["task"]) == ("lora", 1, "hard")]
    port, refit = ([r["value"] for r in chosen if r["arm"] == arm] for arm in ("port", "refit"))
    assert verdict.arms["port"].value == pytest.approx(sum(port) / 2)
    assert verdict.regret is not None
    assert (verdict.regret.seeds, verdict.regret.documents, verdict.regret.paired) == (2, N, True)
    assert verdict.regret.difference == pytest.approx((sum(refit) - sum(port)) / 2)


def test_the_cost_of_a_refit_is_the_time_of_its_training(found: dict[Any, Verdict]) -> None:
    assert found["full", 1, "easy"].refit_device_s == pytest.approx(10.5)


def test_a_port_that_does_nothing_says_so(made_up: MadeUp) -> None:
    flat = [r | {"key": n["key"], "value": n["value"]} for r in made_up.rows for n in made_up.rows
            if n["arm"] == "none" and all(n[k] == r[k] for k in ("lineage", "t", "task", "update_seed"))]  # fmt: skip
    later = [v for v in verdicts(flat, made_up.items) if v.t]
    assert later
    assert {v.decision for v in later} == {"port"}
    assert all("neither arm beats `none`" in v.why for v in later)


def test_an_arm_that_was_not_run_leaves_its_comparisons_empty(made_up: MadeUp) -> None:
    for verdict in verdicts([r for r in made_up.rows if r["arm"] != "refit"], made_up.items):
        assert verdict.regret is None
        assert verdict.retention is None
        assert verdict.lift is not None
        assert verdict.decision is None
        assert verdict.why == ("no refit to compare with" if verdict.t else "the patch was trained here")
    bare = verdicts([r for r in made_up.rows if r["arm"] == "none"], made_up.items)
    assert len(bare) == 12
    assert {v.decision for v in bare} == {None}


def test_a_metric_that_is_no_mean_over_documents_is_compared_unpaired(made_up: MadeUp) -> None:
    rows = [{**row, "metric": "f1", "value": row["value"] * 0.9} for row in made_up.rows]
    for verdict in verdicts(rows, made_up.items):
        assert verdict.regret is not None
        assert not verdict.regret.paired
        assert verdict.arms["port"].stderr is not None


def test_a_metric_of_which_less_is_better_turns_the_comparison_round(made_up: MadeUp) -> None:
    tables = {key: table.set_column(5, "correct", pc.subtract(1, table["correct"]))
              for key, table in made_up.tables.items()}  # fmt: skip
    rows = [{**row, "metric": "error", "higher_is_better": False, "value": 1 - row["value"]} for row in made_up.rows]
    right, wrong = verdicts(made_up.rows, made_up.items), verdicts(rows, tables.__getitem__)
    assert [v.decision for v in wrong] == [v.decision for v in right]
    for a, b in zip(right, wrong, strict=True):
        assert b.arms["refit"].value == pytest.approx(1 - a.arms["refit"].value)
        assert a.regret is not None and b.regret is not None
        assert b.regret.difference == pytest.approx(a.regret.difference)
        assert b.regret.positive_flips == a.regret.positive_flips
    shown = printed(main_table([v for v in wrong if v.lineage == "full"]))
    assert "error ↓" in shown and "+24." in shown  # port−refit: more errors


def test_the_margin_of_a_perplexity_is_a_share_of_the_refits(made_up: MadeUp) -> None:
    worse = {"none": 30.0, "port": 20.3, "refit": 20.0}
    rows = [{**row, "metric": "ppl", "higher_is_better": False, "value": worse[row["arm"]], "stderr": 0.01}
            for row in made_up.rows]  # fmt: skip
    later = [v for v in verdicts(rows, made_up.items) if v.t]
    assert {v.decision for v in later} == {"port"}
    assert {v.why for v in later} == {"porting loses less than 2 % of the refit's ppl"}
    assert {v.decision for v in verdicts(rows, made_up.items, margin=0.01) if v.t} == {"refit"}
    assert later[0].lift is not None and later[0].lift.difference == pytest.approx(9.7)


def test_one_score_beyond_shares_or_below_0_gives_every_cell_of_its_metric_one_scale(made_up: MadeUp) -> None:
    def scales(low: float, high: float) -> set[float]:
        rows = [{**row, "value": low if row["arm"] == "none" else 0.5, "stderr": None} for row in made_up.rows]
        return {v.scale for v in verdicts([*rows[:-1], {**rows[-1], "value": high}]) if v.task == rows[-1]["task"]}

    assert scales(-0.1, 0.5) == {100}  # a correlation
    assert scales(0.1, 2.5) == {1}


def test_two_update_seeds_are_two_replicates_each_the_mean_of_its_patches(made_up: MadeUp) -> None:
    rows = [{**row, "update_seed": s} for row in made_up.rows if row["t"] for s in (0, 1)]
    for verdict in verdicts(rows, made_up.items):
        assert verdict.regret is not None
        assert verdict.regret.seeds == 2
        assert verdict.arms["none"].seeds == 2


def test_ranks_and_apply_modes_have_verdicts_of_their_own_with_the_same_none(made_up: MadeUp) -> None:
    wide = [{**row, "rank": 16} for row in made_up.rows if row["arm"] != "none"]
    kept = [{**row, "apply": "adapter"} for row in made_up.rows if row["arm"] != "none"]
    found = verdicts([*made_up.rows, *wide, *kept], made_up.items)
    assert len(found) == 3 * 12
    assert all("none" in verdict.arms for verdict in found)
    assert {(v.rank, v.apply) for v in found} == {(8, "merged"), (16, "merged"), (8, "adapter")}


def test_several_given_patches_meet_the_refits_one_by_one(made_up: MadeUp) -> None:
    given = [{**row, "seed": None} if row["arm"] == "port" else row for row in made_up.rows]
    alone = [row for row in given if row["arm"] != "port" or row["key"] in first_keys(given, "port")]
    for rows, seeds in ((given, 2), (alone, 2)):
        for verdict in verdicts(rows, made_up.items):
            assert verdict.regret is not None and verdict.lift is not None
            assert verdict.regret.seeds == seeds
    assert verdicts(given, made_up.items)[0].arms["port"].seeds == 2
    assert verdicts(alone, made_up.items)[0].arms["port"].seeds == 1


def first_keys(rows: list[dict[str, Any]], arm: str) -> set[str]:
    """The first cell of an arm in every version and task."""
    found: dict[Any, str] = {}
    for row in rows:
        if row["arm"] == arm:
            found.setdefault((row["lineage"], row["t"], row["task"]), row["key"])
    return set(found.values())


def test_an_arm_with_a_score_that_is_no_number_is_not_judged_by_the_others(made_up: MadeUp) -> None:
    odd = {row["key"] for row in made_up.rows if row["arm"] == "port" and row["t"] == 1 and row["seed"] == 2}
    rows = [{**row, "value": None} if row["key"] in odd else row for row in made_up.rows]
    later = [v for v in verdicts(rows, made_up.items) if v.t]
    assert {(v.t, v.decision == "unsure", v.why) for v in later if v.lost} == {
        (1, True, "1 of 2 port scores are no number")
    }
    assert [v.t for v in later if not v.lost] == [2] * 4
    none_left = [{**row, "value": None} if row["arm"] == "refit" else row for row in made_up.rows]
    assert {v.why for v in verdicts(none_left, made_up.items) if v.t} == {"2 of 2 refit scores are no number"}


def test_a_given_patch_of_another_rank_meets_the_refits(made_up: MadeUp) -> None:
    given = [row | {"rank": 16, "seed": None} if row["arm"] == "port" else row
             for row in made_up.rows if row["arm"] != "port" or row["seed"] == 1]  # fmt: skip
    found = verdicts(given, made_up.items)
    assert {v.rank for v in found} == {8} and {v.decision for v in found if v.t} >= {"port", "refit"}
    both = [*given, *(row | {"rank": 16} for row in made_up.rows if row["arm"] == "refit")]
    assert [(v.rank, set(v.arms)) for v in verdicts(both, made_up.items) if v.t == 1 and v.task == "easy"] == [
        (8, {"none", "refit"}), (16, {"none", "port", "refit"})] * 2  # fmt: skip


def test_a_perplexity_below_1_is_no_share(made_up: MadeUp) -> None:
    rows = [{**row, "metric": "bits_per_byte", "higher_is_better": False} for row in made_up.rows]
    assert {v.scale for v in verdicts(rows)} == {1}


def test_secondary_metrics_do_not_decide(made_up: MadeUp) -> None:
    more = [{**row, "primary": False, "metric": "acc_norm", "value": 0.0} for row in made_up.rows]
    plain = verdicts(made_up.rows, made_up.items)
    both = verdicts([*more, *made_up.rows], made_up.items)
    assert [replace(v, arms={}) for v in both] == [replace(v, arms={}) for v in plain]


def test_cells_over_different_documents_are_refused(made_up: MadeUp) -> None:
    def items(key: str) -> Any:
        table = made_up.tables[key]
        return table.slice(0, N - 1) if key == odd else table

    odd = next(row["key"] for row in made_up.rows if row["arm"] == "refit" and row["t"] == 1)
    rows = [{**r, "value": sum(items(r["key"])["correct"].to_pylist()) / len(items(r["key"]))} for r in made_up.rows]
    with pytest.raises(SpecError, match="cannot be paired"):
        verdicts(rows, items)
