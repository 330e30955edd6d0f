"""The result table: one row per planned coordinate and metric, read from published cells."""

import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from portllm.store.store import Store, damaged, read_json
from portllm.study.steps import TRAININGS, Cell, Diagnosis, Plan

if TYPE_CHECKING:
    import pyarrow

COLUMNS = (
    "model",
    "lineage",
    "t",
    "update",
    "update_seed",
    "task",
    "num_fewshot",
    "arm",
    "source_model",
    "source_t",
    "rank",
    "seed",
    "patches",
    "apply",
    "dtype",
    "metric",
    "filter",
    "primary",
    "higher_is_better",
    "value",
    "stderr",
    "n",
    "key",
    "version_key",
    "wall_s",
)
"""Columns of `portllm results`, in order."""


def rows(cells: Iterable[Cell], store: Store) -> list[dict[str, Any]]:
    """Rows of every published one of the cells, in their order."""
    done = store.published(["evaluate"])
    return published_rows((cell for cell in cells if cell.key in done), store)


def published_rows(cells: Iterable[Cell], store: Store) -> list[dict[str, Any]]:
    """Rows of cells that are published, which nobody looks up again: of 10,000 at a run's start that takes a minute."""
    cache: dict[str, tuple[dict[str, Any], float]] = {}
    return [row for cell in cells for row in _rows(cell, store, cache)]


def _rows(cell: Cell, store: Store, cache: dict[str, tuple[dict[str, Any], float]]) -> Iterator[dict[str, Any]]:
    if cell.key not in cache:
        results = read_json(store.path("evaluate", cell.key) / "results.json")
        cache[cell.key] = results, store.record("evaluate", cell.key)["wall_s"]
    results, wall = cache[cell.key]
    for metric in results["metrics"]:
        yield {
            "model": cell.model,
            "lineage": cell.lineage,
            "t": cell.t,
            "update": cell.update,
            "update_seed": cell.update_seed,
            "task": cell.task,
            "num_fewshot": results["num_fewshot"],
            "arm": cell.arm,
            "source_model": None if cell.arm == "none" else cell.model,
            "source_t": cell.source_t,
            "rank": cell.rank,
            "seed": cell.seed,
            "patches": list(cell.patches),
            "apply": cell.apply,
            "dtype": cell.dtype,
            "metric": metric["metric"],
            "filter": metric["filter"],
            "primary": metric["primary"],
            "higher_is_better": metric["higher_is_better"],
            "value": metric["value"],
            "stderr": metric["stderr"],
            "n": results["n"],
            "key": cell.key,
            "version_key": cell.version_key,
            "wall_s": wall,
        }


COORDINATES = ("model", "lineage", "t", "update", "update_seed", "task", "rank", "seed")
FORESIGHT = (
    "frobenius", "spectral", "effective_rank", "relative", "lost", "absorbed", "update_size", "overlap_out",
    "overlap_in", "residual", "residual_of_patch", "residual_of_patched",
)  # fmt: skip
"""Numbers of a diagnosis, over all of a patch's modules; null where there is nothing to compare with."""


def diagnoses(plan: Plan, store: Store) -> list[dict[str, Any]]:
    """One row per published diagnosis: its coordinates, its numbers, its key."""
    done = store.published(["diagnose"])
    return [_diagnosis(asked, store) for asked in plan.diagnoses if asked.key in done]


def _diagnosis(asked: Diagnosis, store: Store) -> dict[str, Any]:
    total = store.record("diagnose", asked.key)["summary"]
    total["update_size"] = total.get("update")
    at = {name: getattr(asked, name) for name in COORDINATES}
    return at | {name: total.get(name) for name in FORESIGHT} | {"key": asked.key}


def items(store: Store, key: str) -> "pyarrow.Table":
    """Items of a published cell: doc_id, doc_hash, choice_loglikelihoods, prediction, target, correct, text, filter."""
    import pyarrow
    import pyarrow.parquet

    path = store.path("evaluate", key) / "items.parquet"
    try:
        return pyarrow.parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise damaged(path, error) from None


def trainings(plan: Plan, store: Store) -> list[dict[str, Any]]:
    """Published trainings of a plan: stage, key, label, coordinates, wall_s, summary, curve, devices, recipe."""
    done = store.published(sorted(TRAININGS))
    steps = [s for s in plan.steps.values() if s.key in done and s.stage in TRAININGS]
    return [training(step, store) for step in steps]


def training(step: Any, store: Store) -> dict[str, Any]:
    """One published training."""
    record = store.record(step.stage, step.key)
    curve = store.path(step.stage, step.key) / "curve.jsonl"
    lines = curve.read_text().splitlines() if curve.is_file() else []
    try:
        points = [json.loads(line) for line in lines]
    except ValueError as error:
        raise damaged(curve, error) from None
    return {
        "stage": step.stage,
        "key": step.key,
        "label": step.label,
        "coordinates": dict(step.coordinates),
        "wall_s": record["wall_s"],
        "summary": record["summary"],
        "curve": points,
        "devices": record["devices"],
        "device_s": record.get("device_s"),
        "expected": record.get("expected"),
        "recipe": record["payload"]["recipe"],
        "inputs": record["payload"]["inputs"],
        "finished_at": record["started"] + record["wall_s"],
        "path": str(store.path(step.stage, step.key)),
    }
