"""Opening a study's mirror, and rebuilding its runs from the store."""

from __future__ import annotations

import os
from collections import defaultdict
from typing import TYPE_CHECKING

from portllm.store.results import rows, trainings
from portllm.store.store import Store
from portllm.study.plan import Plan
from portllm.study.spec import Study

if TYPE_CHECKING:
    from portllm.track.mlflow_mirror import Mirror


def tracking_uri(study: Study, store: Store) -> str:
    """The study's, else MLFLOW_TRACKING_URI, else SQLite in the store."""
    return study.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{store.root / 'mlflow.db'}"


def open_mirror(study: Study, plan: Plan, store: Store) -> Mirror | None:
    """The mirror of a study; None where tracking is off."""
    if not study.tracking.enabled:
        return None
    from portllm.track.mlflow_mirror import Mirror

    tags = {
        "models": ",".join(study.models),
        "lineages": ",".join(study.lineages),
        "tasks": ",".join(t.task for t in study.tasks),
        "store": str(store.root),
    }
    return Mirror(
        tracking_uri(study, store),
        study.tracking.experiment or study.name,
        study.name,
        tags,
        str(store.root / "mlflow"),
    )


def rebuild_study(study: Study, plan: Plan, store: Store) -> str:
    """Write every published training and cell that MLflow lacks; says what it did."""
    mirror = open_mirror(study, plan, store)
    if mirror is None:
        return f"{study.name}: tracking is switched off (tracking.enabled)"
    steps = trainings(plan, store)
    for step in steps:
        mirror.training(step)
    by_key = defaultdict(list)
    for row in rows(plan.cells, store):
        by_key[row["key"]].append(row)
    for group in by_key.values():
        mirror.cell(group)
    report = store.paths.study(study.name) / "report.html"
    if report.is_file():
        mirror.artifact(report)
    warnings = mirror.close(timeout=600)
    text = f"{study.name}: {len(steps)} trainings and {len(by_key)} cells are in {tracking_uri(study, store)}"
    return "\n".join([text, *(f"warning: {w}" for w in warnings)])
