"""What the mirror writes, as plain values: one entry per MLflow child run. Pure: of MLflow it knows the limits only.

A training step becomes one entry; all cells of one (version, patches, apply, dtype) become another, their scores named
`task/metric` (`task.5shot/metric` where the study sets the shots, `task/metric.filter` where a filter has a name).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeGuard

from portllm.study.keys import digest

PARAM_LENGTH = 6000
TAG_LENGTH = 8000
NAME_LENGTH = 250
WALL = "/wall_s"
"""Ends the name of the metric that tells a cell's seconds."""
CURVE = ("loss", "learning_rate", "grad_norm", "tokens_per_s")
COORDINATES = (
    "model", "lineage", "t", "update", "update_seed", "task", "arm", "source_model", "source_t", "rank", "seed",
    "num_fewshot", "apply", "dtype",
)  # fmt: skip
"""Tags of every run: MLflow shows nesting only in one sort order, so each run says where it belongs."""


@dataclass(frozen=True)
class Point:
    """One value of a metric. Without a step the newest value counts."""

    name: str
    value: float
    step: int | None = None
    after_s: float = 0.0
    """Seconds from the run's start."""


@dataclass(frozen=True)
class Entry:
    """One child run."""

    key: str
    name: str
    kind: Literal["training", "cells"]
    tags: Mapping[str, str]
    params: Mapping[str, str] = field(default_factory=dict)
    points: Sequence[Point] = ()
    keys: Mapping[str, Any] = field(default_factory=dict)
    """Content of the artifact keys.json."""
    path: Path | None = None
    """The published directory."""
    wall_s: float = 0.0
    """Of a training; a run of cells has a metric `…/wall_s` for each."""
    finished_at: float | None = None
    """Seconds since 1970; None where it is not known."""


def training(step: Mapping[str, Any]) -> Entry:
    """The entry of a training step. Optional parts of `step`: recipe, inputs, path, finished_at."""
    where = dict(step.get("coordinates") or {})
    return Entry(
        key=step["key"],
        name=step["label"],
        kind="training",
        tags={"stage": step["stage"]} | _tags([where]),
        params=flat(step.get("recipe") or {}),
        points=_curve(step.get("curve") or ()) + _facts(step),
        keys={"key": step["key"], "label": step["label"], "inputs": dict(step.get("inputs") or {})},
        path=Path(step["path"]) if step.get("path") else None,
        wall_s=float(step.get("wall_s") or 0.0),
        finished_at=step.get("finished_at"),
    )


def cells(rows: Sequence[Mapping[str, Any]]) -> Entry:
    """The entry of rows that share version, patches, apply mode and dtype."""
    first = rows[0]
    named = {_metric(row): row for row in rows if row["value"] is not None}
    patches = {f"patch{i}": key for i, key in enumerate(first["patches"], start=1)}
    return Entry(
        key=group_key(first),
        name=_cells_name(rows),
        kind="cells",
        tags={"stage": "evaluate"} | _tags(rows),
        params={"version": first["version_key"], "apply": first["apply"], "dtype": first["dtype"]} | patches,
        points=[point for name, row in named.items() for point in _scored(name, row)] + _walls(rows),
        keys={"version": first["version_key"], "patches": list(first["patches"])}
        | {"cells": {name: row["key"] for name, row in named.items()}},
    )


def groups(rows: Iterable[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Rows that belong to one entry, together."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(group_key(row), []).append(row)
    return list(found.values())


def group_key(row: Mapping[str, Any]) -> str:
    """Identity of an entry of cells."""
    return digest({name: row[name] for name in ("version_key", "patches", "apply", "dtype")})


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted names; None and empty parts left out, long values cut at MLflow's limit."""
    found: dict[str, str] = {}
    for name, part in value.items():
        if isinstance(part, Mapping):
            found |= flat(part, f"{prefix}{name}.")
        elif part is not None and part not in ((), []):
            found[clean(f"{prefix}{name}")] = str(part)[:PARAM_LENGTH]
    return found


def clean(name: str) -> str:
    """A name MLflow accepts: letters, digits, `_ - . / space`; no empty or dotted path parts; short enough."""
    parts = [re.sub(r"[^\w.\- ]", "_", part).strip() for part in name.split("/")]
    return shortened("/".join(part if part.strip(".") else f"_{part}" for part in parts))


def shortened(name: str) -> str:
    """A name within MLflow's limit, still its own: what is cut off the middle leaves a digest."""
    if len(name) <= NAME_LENGTH:
        return name
    return f"{name[: NAME_LENGTH - 60]}_{digest({'name': name})[:8]}_{name[-50:]}"


def _metric(row: Mapping[str, Any]) -> str:
    kind = "" if row["filter"] in (None, "", "none") else f".{row['filter']}"
    return clean(f"{_task(row)}/{row['metric']}{kind}")


def _task(row: Mapping[str, Any]) -> str:
    shots = "" if not row["num_fewshot"] else f".{row['num_fewshot']}shot"
    # A task of the user's may hold a slash; the one between task and metric is ours.
    return str(row["task"]).replace("/", "_") + shots


def _walls(rows: Sequence[Mapping[str, Any]]) -> list[Point]:
    """Seconds that each cell took."""
    walls = {clean(f"{_task(row)}{WALL}"): float(row["wall_s"] or 0.0) for row in rows}
    return [Point(name, wall) for name, wall in walls.items()]


def _scored(name: str, row: Mapping[str, Any]) -> list[Point]:
    points = [Point(name, float(row["value"])), Point(shortened(f"{name}_stderr"), float(row["stderr"] or 0.0))]
    return [p for p in (points if row["stderr"] is not None else points[:1]) if math.isfinite(p.value)]


def _curve(curve: Iterable[Mapping[str, Any]]) -> list[Point]:
    return [
        Point(name, float(point[name]), int(point["step"]), float(point.get("elapsed_s") or 0.0))
        for point in curve
        for name in CURVE
        if _is_number(point.get(name))
    ]


def _facts(step: Mapping[str, Any]) -> list[Point]:
    """The ledger of a training: numbers of its summary, apart from the curve's names."""
    facts: dict[str, Any] = {"wall_s": step.get("wall_s"), "devices": step.get("devices")}
    facts |= dict(step.get("summary") or {})
    return [Point(clean(f"summary/{name}"), float(value)) for name, value in facts.items() if _is_number(value)]


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _tags(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Each coordinate's values: several, with commas, where a run stands under several (t = 0 under every lineage)."""
    found = {name: {str(row[name]) for row in rows if row.get(name) is not None} for name in COORDINATES}
    return {name: joined(values) for name, values in found.items() if values}


def joined(values: Iterable[str]) -> str:
    """Several values of one tag, within MLflow's limit."""
    return ",".join(sorted(values))[:TAG_LENGTH]


def _cells_name(rows: Sequence[Mapping[str, Any]]) -> str:
    """`tiny/lora/t1/port/sst2/r8/s1`: the first of the run's coordinates."""
    first = rows[0]
    parts = [first["model"], first["lineage"], f"t{first['t']}", first["arm"]]
    if first["arm"] != "none":
        parts += [
            first["task"],
            *(f"{short}{first[n]}" for short, n in (("r", "rank"), ("s", "seed")) if first[n] is not None),
        ]
    return "/".join(str(part) for part in parts)
