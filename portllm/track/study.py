"""A study's mirror: where it is tracked, opening it for a run, rebuilding it from the store."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from portllm.store.results import rows, trainings
from portllm.store.store import Store
from portllm.study.spec import Study
from portllm.study.steps import Plan, Step

if TYPE_CHECKING:
    from portllm.track.mlflow_mirror import Mirror


def open_mirror(study: Study, store: Store) -> Mirror | None:
    """The mirror of a study; None where tracking is off."""
    if not study.tracking.enabled:
        return None
    from portllm.track.mlflow_mirror import Mirror

    return Mirror(**_place(study, store))


def begun(step: Step) -> dict[str, Any]:
    """A training that is not published yet, as the mirror takes it."""
    payload = step.payload()
    return {
        "stage": step.stage,
        "key": step.key,
        "label": step.label,
        "coordinates": dict(step.coordinates),
        "recipe": payload["recipe"],
        "inputs": payload["inputs"],
    }


def rebuild_study(study: Study, plan: Plan, store: Store) -> tuple[str, list[str]]:
    """Write every published training and cell that MLflow lacks; says what it did, and what it could not do."""
    if not study.tracking.enabled:
        return f"{study.name}: tracking is switched off (tracking.enabled)", []
    from portllm.track.mlflow_mirror import rebuild

    steps, found = trainings(plan, store), rows(plan.cells, store)
    artifacts = [path for path in study_artifacts(study.name, store) if path.is_file()]
    place = _place(study, store)
    warnings = rebuild(**place, steps=steps, rows=found, artifacts=artifacts)
    return f"{study.name}: {len(steps)} trainings and {len(found)} result rows are in {place['uri']}", warnings


def study_artifacts(name: str, store: Store) -> list[Any]:
    """What a study's run carries: its result table and its report."""
    return [store.paths.study(name) / "results.parquet", store.paths.study(name) / "report.html"]


def _place(study: Study, store: Store) -> dict[str, Any]:
    from portllm.track.entries import joined
    from portllm.track.mlflow_mirror import destination

    uri, artifacts = destination(store.root, study.tracking.uri)
    tags = {
        "models": joined(study.models),
        "lineages": joined(study.lineages),
        "tasks": joined(t.task for t in study.tasks),
        "store": str(store.root),
    }
    return {
        "uri": uri,
        "experiment": study.tracking.experiment or study.name,
        "study_name": study.name,
        "study_tags": tags,
        "artifact_root": artifacts,
    }
