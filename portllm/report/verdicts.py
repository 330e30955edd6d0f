"""From result rows to verdicts: one patch recipe on one version, its arms side by side, and the decision.

rows → grouped by (model, lineage, t, task, few-shot, rank, apply, dtype) → items paired → comparisons → Holm over the
tasks → decisions. Only primary rows count. A given patch of a rank that no refit has meets the refits of every rank.
What pairs with what: port and refit of the same update seed and the same
fine-tuning seed. `none` and a given patch have no fine-tuning seed: one alone meets every row of the other arm, several
given patches meet it one by one (each with each would count the same patches as more replicates than there are; those
of the larger arm that find no partner show in its own score only).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from portllm.errors import StoreError
from portllm.report.costs import device_s
from portllm.report.statistics import (
    MARGIN,
    Comparison,
    Decision,
    Estimate,
    Floats,
    Scores,
    compare,
    decide,
    estimate,
    holm,
    ordered,
    retention,
    stack,
    unpaired,
)
from portllm.report.text import share

if TYPE_CHECKING:
    import pyarrow as pa

Row = Mapping[str, Any]
"""One result row, keyed by the columns of `store.results.COLUMNS`."""
Items = Callable[[str], "pa.Table"]
"""A cell's key → its items."""
ARMS = ("none", "port", "warm", "refit")
"""In the order of what they cost."""
NO_SHARES = ("perplexity", "bits_per_byte", "likelihood_diff", "brier", "loss")
"""In the names of metrics whose values may lie between 0 and 1, and which are no shares."""


@dataclass(frozen=True)
class Verdict:
    """A patch recipe on one version of one lineage, for one task: is the old patch good enough there?"""

    model: str
    lineage: str
    t: int
    task: str
    num_fewshot: int | None
    rank: int | None
    apply: str
    dtype: str
    metric: str
    higher_is_better: bool
    arms: Mapping[str, Estimate]
    """By arm name; an arm that was not run is absent."""
    regret: Comparison | None
    """What the refit is better by than the port: refit − port, or port − refit where lower scores are better."""
    lift: Comparison | None
    """What the port is better by than no patch."""
    gain: Comparison | None
    """What the refit is better by than no patch."""
    retention: float | None
    adjusted_p: float | None
    """p of the regret, Holm over the tasks of this version."""
    decision: Decision | None
    """None at t = 0, where the patch was trained."""
    why: str
    margin: float
    """Largest regret that does not matter, as a share: of the scale of scores that are shares, of the refit's score
    for other metrics."""
    refit_device_s: float | None
    """Device seconds of one refit, mean over seeds. Porting costs none."""
    lost: str
    """Which scores of this arm or that are no number; empty where all are."""
    scale: float
    """What a score is multiplied with for reading: 100 for shares, 1 for other metrics (perplexity)."""

    @property
    def name(self) -> str:
        """The task, with its few-shot setting when there are shots."""
        return self.task if not self.num_fewshot else f"{self.task} ({self.num_fewshot}-shot)"

    @property
    def sign(self) -> int:
        """+1, or −1 where lower scores are better."""
        return 1 if self.higher_is_better else -1

    @property
    def bound(self) -> float:
        """The margin in the metric's unit."""
        return self.margin if self.scale == 100 else self.margin * abs(self.arms["refit"].value)

    @property
    def unit(self) -> str:
        """The metric, with an arrow where lower scores are better."""
        return self.metric if self.higher_is_better else f"{self.metric} ↓"

    @property
    def block(self) -> tuple[str, str, int | None, str, str]:
        """What stands in one table: model, lineage, rank, apply mode, dtype."""
        return (self.model, self.lineage, self.rank, self.apply, self.dtype)

    @property
    def sure(self) -> float | None:
        """Probability that porting loses less than the margin."""
        return None if self.regret is None else self.regret.probability_below(self.bound)


def verdicts(
    rows: Iterable[Row],
    items: Items | None = None,
    steps: Iterable[Mapping[str, Any]] = (),
    margin: float = MARGIN,
    seed: int = 0,
) -> list[Verdict]:
    """Every verdict of the results by model, lineage, rank, t and task; names in the order the rows bring them.

    Without `items` (or where a metric is no mean over documents) arms are compared unpaired. Raises SpecError where two
    arms were scored on different documents.
    """
    read = None if items is None else lru_cache(maxsize=512)(lambda key, kind: scores(items(key), kind))
    seconds = device_seconds(steps)
    found = [_verdict(group, arms, read, seconds, margin, seed) for group, arms in _groups(rows)]
    return [_decided(verdict, p) for verdict, p in zip(_scaled(found), _adjusted(found), strict=True)]


def device_seconds(steps: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Step key → device seconds."""
    return {step["key"]: spent for step in steps if (spent := device_s(step)) is not None}


def scores(table: pa.Table, kind: str | None) -> Scores | None:
    """A cell's scores under one filter; None where an item has no score of its own."""
    rows = table.select(["doc_hash", "doc_id", "correct", "filter"]).to_pydict()
    keep = [i for i, name in enumerate(rows["filter"]) if kind is None or name is None or name == kind]
    if not keep:
        raise StoreError(f"items hold no filter {kind!r}; they have {sorted(set(rows['filter']))}")
    column = {name: [rows[name][i] for i in keep] for name in ("doc_hash", "doc_id", "correct")}
    return None if None in column["correct"] else ordered(**column)


Version = tuple[str, str, int, str, int | None, str]
"""Model, lineage, t, task, few-shot setting, dtype."""
Group = tuple[str, str, int, str, int | None, int | None, str, str]
"""Model, lineage, t, task, few-shot setting, rank, apply mode, dtype."""
Read = Callable[[str, str | None], Scores | None]


def _groups(rows: Iterable[Row]) -> list[tuple[Group, dict[str, list[Row]]]]:
    """Rows per group and arm. A `none` row has no rank: it joins every group of its version, task and dtype."""
    bare: dict[Version, list[Row]] = {}
    patched: dict[tuple[Version, str], list[Row]] = {}
    seen: dict[str, int] = {}
    for row in (r for r in rows if r["primary"] and r["arm"] in ARMS):
        for name in (row["model"], row["lineage"], row["task"]):
            seen.setdefault(name, len(seen))
        version = (row["model"], row["lineage"], row["t"], row["task"], row["num_fewshot"], row["dtype"])
        if row["arm"] == "none":
            bare.setdefault(version, []).append(row)
        else:
            patched.setdefault((version, row["apply"]), []).append(row)
    groups: dict[Group, dict[str, list[Row]]] = {}
    for (version, apply), members in patched.items():
        none = {"none": bare[version]} if version in bare else {}
        for rank, arms in _by_rank(members).items():
            groups[*version[:5], rank, apply, version[5]] = arms | none
    for version in bare.keys() - {version for version, _ in patched}:
        groups[*version[:5], None, bare[version][0]["apply"], version[5]] = {"none": bare[version]}
    return sorted(groups.items(), key=lambda entry: _order(entry[0], seen))


def _by_rank(rows: Sequence[Row]) -> dict[int | None, dict[str, list[Row]]]:
    """Patched rows of one version and task per rank and arm.

    A given patch (its ports have no seed), and what was trained from it, are compared with the refits there are, of
    their own rank where it is among them.
    """
    refits = list(dict.fromkeys(row["rank"] for row in rows if row["arm"] == "refit"))
    given = any(row["arm"] == "port" and row["seed"] is None for row in rows)
    found: dict[int | None, dict[str, list[Row]]] = {}
    for row in rows:
        for rank in refits if given and refits and row["rank"] not in refits else [row["rank"]]:
            found.setdefault(rank, {}).setdefault(row["arm"], []).append(row)
    return found


def _order(group: Group, seen: Mapping[str, int]) -> tuple[Any, ...]:
    model, lineage, t, task, shots, rank, apply, dtype = group
    return (seen[model], seen[lineage], rank or 0, apply, dtype, t, seen[task], -1 if shots is None else shots)


def _verdict(
    group: Group, arms: dict[str, list[Row]], read: Read | None, seconds: Mapping[str, float], margin: float, seed: int
) -> Verdict:
    model, lineage, t, task, shots, rank, apply, dtype = group
    first = next(iter(arms.values()))[0]
    lost = _lost(arms)
    arms = {arm: kept for arm, rows in arms.items() if (kept := [row for row in rows if row["value"] is not None])}
    rising = first["higher_is_better"]
    against = {
        name: _compared(arms.get(a if rising else b, []), arms.get(b if rising else a, []), read, seed)
        for name, a, b in (("regret", "refit", "port"), ("lift", "port", "none"), ("gain", "refit", "none"))
    }
    return Verdict(
        model, lineage, t, task, shots, rank, apply, dtype,
        metric=first["metric"],
        higher_is_better=rising,
        arms={name: _estimated(arms[name], read) for name in ARMS if name in arms},
        retention=retention(against["lift"], against["gain"]),
        adjusted_p=None,
        decision=None,
        why="the patch was trained here",
        margin=margin,
        refit_device_s=_refit_cost(arms.get("refit", []), seconds),
        lost=lost,
        scale=1,
        **against,
    )  # fmt: skip


def _lost(arms: Mapping[str, Sequence[Row]]) -> str:
    """A score that lm-eval's aggregation could not make finite: its arm may not be judged by the rest."""
    missing = {arm: sum(row["value"] is None for row in arms.get(arm, ())) for arm in ("port", "refit")}
    said = [f"{count} of {len(arms[arm])} {arm} scores" for arm, count in missing.items() if count]
    return f"{' and '.join(said)} are no number" if said else ""


def shown(verdicts: Iterable[Verdict]) -> list[str]:
    """The arms of a table: always none, port and refit, and warm where it was run."""
    found = {arm for verdict in verdicts for arm in verdict.arms}
    return [arm for arm in ARMS if arm != "warm" or arm in found]


def _refit_cost(rows: Sequence[Row], seconds: Mapping[str, float]) -> float | None:
    spent = [seconds[key] for row in rows for key in row["patches"] if key in seconds]
    return sum(spent) / len(spent) if spent else None


def _estimated(rows: Sequence[Row], read: Read | None) -> Estimate:
    pairs = [(row, row) for row in rows]
    found = _paired_scores(pairs, read)
    if found is not None:
        return estimate(found[0])
    values_S = _clustered(np.array([[row["value"]] for row in rows]), pairs)[:, 0]
    error = _mean_error(rows)
    if error is not None and len(values_S) > 1:
        error = float(np.sqrt(error**2 + np.var(values_S, ddof=1) / len(values_S)))
    return Estimate(float(values_S.mean()), error, len(values_S), int(rows[0]["n"]))


def _compared(a: Sequence[Row], b: Sequence[Row], read: Read | None, seed: int) -> Comparison | None:
    pairs = _pairs(a, b)
    if not pairs:
        return None
    found = _paired_scores(pairs, read)
    if found is not None:
        return compare(*found, seed=seed)
    values = [_clustered(np.array([[pair[side]["value"]] for pair in pairs]), pairs)[:, 0] for side in (0, 1)]
    errors = [_mean_error([pair[side] for pair in pairs]) for side in (0, 1)]
    return unpaired(values[0], values[1], errors[0], errors[1], int(a[0]["n"]), seed)


def _pairs(a: Sequence[Row], b: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Rows of the same update seed and fine-tuning seed; without one a row meets all of them, several one each."""
    found: list[tuple[Row, Row]] = []
    for update_seed in dict.fromkeys(row["update_seed"] for row in a):
        xs, ys = ([row for row in rows if row["update_seed"] == update_seed] for rows in (a, b))
        if None not in [row["seed"] for row in (*xs, *ys)]:
            found += [(x, y) for x in xs for y in ys if x["seed"] == y["seed"]]
        else:
            found += zip(xs, ys, strict=False) if min(len(xs), len(ys)) > 1 else product(xs, ys)
    return found


def _paired_scores(pairs: Sequence[tuple[Row, Row]], read: Read | None) -> tuple[Floats, Floats] | None:
    """Both sides as (S, N), or None where items cannot stand for the metric."""
    if read is None:
        return None
    cells = [[_faithful(row, read) for row in pair] for pair in pairs]
    flat = [cell for sides in cells for cell in sides if cell is not None]
    if len(flat) < 2 * len(cells):
        return None
    both = _clustered(stack(flat).reshape(len(cells), -1), pairs).reshape(-1, 2, len(flat[0].values_N))
    return both[:, 0], both[:, 1]


def _faithful(row: Row, read: Read) -> Scores | None:
    """A cell's scores, when their mean is the row's value (accuracy is such a mean; F1 over the whole set is not)."""
    found = read(row["key"], row["filter"])
    return found if found is not None and abs(float(found.values_N.mean()) - row["value"]) < 1e-6 else None


def _clustered(x_SK: Floats, pairs: Sequence[tuple[Row, Row]]) -> Floats:
    """Replicates. Several update seeds: one row each, the mean over its fine-tuning seeds, which share the version."""
    labels = [pair[0]["update_seed"] for pair in pairs]
    if len(set(labels)) == 1:
        return x_SK
    return np.stack([x_SK[[label == name for label in labels]].mean(axis=0) for name in dict.fromkeys(labels)])


def _mean_error(rows: Sequence[Row]) -> float | None:
    """Root mean square of the cells' own standard errors."""
    errors = [row["stderr"] for row in rows]
    return None if None in errors else float(np.sqrt(np.mean(np.square(errors))))


def _scaled(found: Sequence[Verdict]) -> list[Verdict]:
    """One scale per task and metric: points where every score lies in [−1, 1] (a correlation may be below 0)."""
    beyond = {
        (v.task, v.metric)
        for v in found
        if any(abs(arm.value) > 1 for arm in v.arms.values()) or any(name in v.metric for name in NO_SHARES)
    }
    return [replace(v, scale=1 if (v.task, v.metric) in beyond else 100) for v in found]


def _adjusted(found: Sequence[Verdict]) -> list[float | None]:
    """Holm over the tasks of each version of each block."""
    families: dict[tuple[Any, ...], list[int]] = {}
    for index, verdict in enumerate(found):
        if verdict.regret is not None and verdict.regret.p_value is not None:
            families.setdefault((*verdict.block, verdict.t), []).append(index)
    adjusted: list[float | None] = [None] * len(found)
    for members in families.values():
        raw = [verdict.regret.p_value for i in members if (verdict := found[i]).regret is not None]
        for index, p in zip(members, holm([p for p in raw if p is not None]), strict=True):
            adjusted[index] = p
    return adjusted


def _decided(verdict: Verdict, p: float | None) -> Verdict:
    if verdict.t == 0:
        return verdict
    if verdict.lost:
        return replace(verdict, decision="unsure", why=verdict.lost)
    if not {"port", "refit"} <= set(verdict.arms):
        patched = {"port", "refit"} & set(verdict.arms)
        missing = " and no ".join(sorted({"port", "refit"} - patched))
        return replace(verdict, why=f"no {missing} to compare with" if patched else "no patch was evaluated here")
    words = f"{share(verdict.margin)} " + ("points" if verdict.scale == 100 else f"% of the refit's {verdict.metric}")
    decision, why = decide(verdict.regret, verdict.bound, words, p)
    if decision == "port" and not (_above(verdict.lift) or _above(verdict.gain)):
        why += ", but neither arm beats `none`: the patch does nothing here"
    return replace(verdict, adjusted_p=p, decision=decision, why=why)


def _above(difference: Comparison | None) -> bool:
    """Whether a difference is above 0 beyond its error; an arm that was not run cannot deny it."""
    return difference is None or difference.low is None or difference.low > 0
