"""One self-contained page for a study: the answer first, then the numbers, the costs, and where they come from.

`render` takes plain values and gives the page's text: styles and charts inline, nothing loaded from anywhere. All text
is escaped by the template (`page.html.j2`); only the charts, made here, go in as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from portllm.report import figures, text
from portllm.report.costs import Cost, costs, device_s
from portllm.report.table import title
from portllm.report.verdicts import ARMS, Row, Verdict, shown

STUDY = (
    "description",
    "models",
    "lineages",
    "tasks",
    "arms",
    "fine-tuning",
    "store",
    "libraries",
    "command",
    "created",
)
"""What `study` may hold besides `name`."""
OPEN_ROWS = 30
"""Longer tables start folded."""


def render(
    study: Mapping[str, Any], rows: Sequence[Row], verdicts: Sequence[Verdict], steps: Sequence[Mapping[str, Any]]
) -> str:
    """The page. `study`: name and any of `STUDY`, `models` and `lineages` as name → settings (of any depth)."""
    blocks = [list(members) for _, members in groupby(verdicts, key=lambda verdict: verdict.block)]
    return _template().render(
        study=dict.fromkeys((*STUDY, "identity")) | dict(study),
        asked=_asked(study),
        counts=_counts(verdicts),
        headline=headline(verdicts, steps),
        margin=text.share(verdicts[0].margin) if verdicts else None,
        unscaled=list(dict.fromkeys(v.metric for v in verdicts if v.scale != 100)),
        falling=list(dict.fromkeys(v.metric for v in verdicts if not v.higher_is_better)),
        blocks=[_block(block, verdicts) for block in blocks],
        decided=_decided(verdicts),
        curves=_curves(verdicts),
        costs=[_cost(line) for line in costs(steps)],
        ledger=[_ledger(step) for step in steps],
        losses=figures.training_curves(steps),
        evaluation=_evaluation(rows),
        steps=steps,
        alike=any(not verdict.t for verdict in verdicts) and all(_alike(v) for v in verdicts if not v.t),
        open_rows=OPEN_ROWS,
    )


@cache
def _template() -> Template:
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html.j2")


def _asked(study: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The study's parts as (heading, [(name, settings)])."""
    named = [(part, study.get(part) or {}) for part in ("models", "lineages")]
    groups = [
        (part, [(name, text.described(value)) for name, value in found.items()]) for part, found in named if found
    ]
    plain = [(part, study.get(part)) for part in ("tasks", "arms", "fine-tuning")]
    lists = [(part, ", ".join(text.described(value) for value in _listed(found))) for part, found in plain if found]
    return groups + ([("grid", lists)] if lists else [])


def _listed(value: Any) -> Sequence[Any]:
    if isinstance(value, Mapping):
        return [f"{name}: {text.described(part)}" for name, part in value.items()]
    return value if isinstance(value, (list, tuple)) else [value]


def _counts(verdicts: Sequence[Verdict]) -> dict[str, int]:
    return {name: sum(verdict.decision == name for verdict in verdicts) for name in ("port", "refit", "unsure")}


def headline(verdicts: Sequence[Verdict], steps: Sequence[Mapping[str, Any]]) -> str:
    """The study's answer in one or two sentences, made from its numbers only."""
    counts, total = _counts(verdicts), sum(verdict.decision is not None for verdict in verdicts)
    later = {arm for verdict in verdicts if verdict.t for arm in verdict.arms}
    if not total and "port" in later and "refit" not in later:
        return "Nothing was refitted, so there is nothing to decide: the tables show what the old patch scores."
    if not total and later - {"none"}:
        return "There is nothing to decide: port and refit were not both evaluated on an updated version."
    if not total:
        return "There is nothing to decide yet: no patch was evaluated on an updated version."
    parts = [f"the old patch is good enough in {counts['port']} of {total} cases"]
    if counts["refit"]:
        parts.append(f"refitting is worth it in {counts['refit']}")
    if counts["unsure"]:
        parts.append(f"{counts['unsure']} cannot be told with these documents and seeds")
    refit = next(line for line in costs(steps) if line.name == "refit")
    price = f" One refit took {text.seconds(refit.device_s)} of device time on average; porting takes no training."
    return f"{', '.join(parts)}.".capitalize() + (price if refit.device_s else "")


def _block(members: Sequence[Verdict], among: Sequence[Verdict]) -> dict[str, Any]:
    """One model and lineage: tasks as rows, versions as columns."""
    names, times = list(dict.fromkeys(v.name for v in members)), sorted({v.t for v in members})
    at = {(v.name, v.t): v for v in members}
    alike = all(_alike(v) for v in members if not v.t)
    rows = [
        {
            "task": name,
            "metric": next(v.unit for v in members if v.name == name),
            "cost": _price([v for v in members if v.name == name]),
            "cells": [_scored(at.get((name, t))) for t in times],
        }
        for name in names
    ]
    columns = [["none", "patch"] if not t and alike else shown(among) for t in times]
    return {"title": title(members[0], among), "times": times, "columns": columns, "rows": rows}


def _alike(verdict: Verdict) -> bool:
    """Whether one patch stands for every arm, as at t = 0 where no patch was given."""
    patched = [verdict.arms[arm].value for arm in ARMS[1:] if arm in verdict.arms]
    return len(set(patched)) <= 1


def _price(members: Sequence[Verdict]) -> str | None:
    """What one refit of this patch takes, mean over the versions."""
    known = [v.refit_device_s for v in members if v.t and v.refit_device_s is not None]
    return text.seconds(sum(known) / len(known)) if known else None


def _scored(verdict: Verdict | None) -> dict[str, Any] | None:
    if verdict is None:
        return None
    scores = {}
    for arm in ARMS:
        found = verdict.arms.get(arm)
        value = None if found is None else text.points(found.value, verdict.scale)
        scores[arm] = (value, "" if found is None else text.error(found.stderr, verdict.scale))
    scores["patch"] = next((scores[arm] for arm in ARMS[1:] if scores[arm][0] is not None), scores["port"])
    return {
        "t": verdict.t,
        "arms": scores,
        "decision": verdict.decision,
        "why": verdict.why,
        "lead": text.difference(verdict.regret, -verdict.sign * verdict.scale),
        "interval": text.interval(verdict.regret, verdict.scale),
        "sure": text.chance(verdict.sure),
    }


def _decided(verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """Every decision with everything it rests on."""
    reach = _reach(verdicts)
    titles = {v.block: title(v, verdicts) for v in {v.block: v for v in verdicts}.values()}
    return [_line(verdict, titles[verdict.block], reach) for verdict in verdicts if verdict.decision]


def _line(verdict: Verdict, where: str, reach: float) -> dict[str, Any]:
    regret, lift = verdict.regret, verdict.lift
    return (_scored(verdict) or {}) | {
        "task": verdict.name,
        "where": where,
        "rank": verdict.rank,
        "retention": text.percent(verdict.retention),
        "regret": text.difference(regret, verdict.scale),
        "p": text.NOTHING if verdict.adjusted_p is None else f"{verdict.adjusted_p:.2g}",
        "lift": text.difference(lift, verdict.sign * verdict.scale),
        "lost": text.percent(regret.positive_flips if regret else None),
        "won": text.percent(regret.negative_flips if regret else None),
        "n": None if regret is None else (regret.documents, regret.seeds, regret.paired),
        "bar": _bar(verdict, reach),
    }


def _reach(verdicts: Sequence[Verdict]) -> float:
    """Half the width of the interval bars, in the metric's unit: the widest regret, and a few margins at least."""
    ends = [abs(v.regret.difference) for v in verdicts if v.decision and v.regret is not None and v.scale == 100]
    return max([1.25 * end for end in ends] + [4 * verdict.margin for verdict in verdicts[:1]], default=1.0)


def _bar(verdict: Verdict, reach: float) -> dict[str, float] | None:
    """Places of the interval in a bar 100 wide, 0 in the middle."""
    regret = verdict.regret
    if regret is None or regret.low is None or regret.high is None or verdict.scale != 100:
        return None
    ends = {"low": regret.low, "high": regret.high, "mid": regret.difference, "margin": verdict.margin}
    return {name: round(50 + 50 * max(-1.0, min(1.0, value / reach)), 2) for name, value in ends.items()}


def _curves(verdicts: Sequence[Verdict]) -> list[tuple[str, list[Any]]]:
    """(model, a figure per task), where there is more than one version to draw."""
    found: dict[str, dict[str, list[Verdict]]] = {}
    for verdict in verdicts:
        found.setdefault(verdict.model, {}).setdefault(verdict.name, []).append(verdict)
    return [
        (model, [(task, figures.over_versions(members)) for task, members in tasks.items()])
        for model, tasks in found.items()
        if len({verdict.t for members in tasks.values() for verdict in members}) > 1
    ]


def _cost(line: Cost) -> dict[str, Any]:
    return {
        "name": line.name,
        "note": line.note,
        "trainings": line.trainings,
        "parameters": text.count(line.trainable_parameters),
        "tokens": text.count(line.tokens),
        "hours": text.hours(line.device_s),
        "total": text.hours(line.total_device_s),
        "memory": text.size(line.peak_rss_bytes),
        "device_memory": text.size(line.peak_device_bytes),
        "utilisation": text.percent(line.utilisation),
        "energy": text.energy(line.energy_j),
    }


def _ledger(step: Mapping[str, Any]) -> dict[str, Any]:
    summary = step.get("summary") or {}
    losses = [summary.get(name) for name in ("loss_first", "loss_last")]
    expected = step.get("expected") or {}
    return {
        "label": step["label"],
        "stage": step["stage"],
        "wall": text.seconds(step.get("wall_s")),
        "device_s": text.seconds(device_s(step)),
        "devices": step.get("devices") or 1,
        "zero": text.NOTHING if summary.get("zero") is None else summary["zero"],
        "steps": text.count(summary.get("steps")),
        "tokens": text.count(summary.get("tokens")),
        "rate": text.count(summary.get("tokens_per_s")),
        "loss": text.NOTHING if None in losses else f"{losses[0]:.3f} → {losses[1]:.3f}",
        "memory": text.size(summary.get("peak_rss_bytes")),
        "device_memory": text.size(summary.get("peak_device_bytes")),
        "expected_s": text.seconds(expected.get("device_s")),
        "expected_memory": text.size(expected.get("memory_bytes")),
        "utilisation": text.percent(summary.get("utilisation")),
        "energy": text.energy(summary.get("energy_j")),
        "resumed": len(summary.get("resumed") or []),
    }


def _evaluation(rows: Sequence[Row]) -> dict[str, Any]:
    spent = {row["key"]: row["wall_s"] or 0.0 for row in rows}
    return {"cells": len(spent), "rows": len(rows), "wall": text.seconds(sum(spent.values()))}
