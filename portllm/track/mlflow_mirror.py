"""The MLflow mirror of a study: a copy for looking at, never the truth. The store is the truth, and rebuilds it.

One thread writes, from a queue, so that nothing ever waits for it; MLflow is imported in that thread. Runs: a parent
per study, below it one per training step and one per (version, patches, apply, dtype). Each carries the tag
`portllm.key`: what is there is not written again, what is half there is completed, so a second run of a study, a run
after a kill, and a rebuild are the same act. Errors are collected and handed back by `close`; they never fail a study.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice, zip_longest
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from portllm.errors import EngineError
from portllm.study.keys import digest
from portllm.track.entries import WALL, Entry, Point, cells, groups, joined, shortened, training

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Param, Run, RunTag

METRICS_PER_REQUEST, PARAMS_PER_REQUEST, TAGS_PER_REQUEST = 800, 100, 100
"""MLflow's limits are 1000, 100 and 100, and 1000 for all three together. One request, one commit."""
COPIED_BYTES = 50_000_000
"""A published directory is copied into MLflow up to this size; of a larger one only the path is noted."""
PATIENCE = 3
"""Failures in a row after which the rest is left to a rebuild: MLflow's own retries can take minutes each."""
KEY, STUDY, PATH = "portllm.key", "portllm.study", "portllm.path"

Row = Mapping[str, Any]
Job = Callable[["_Writer"], None]
T = TypeVar("T")


def destination(store: str | Path, uri: str | None = None) -> tuple[str, str | None]:
    """Where to track: `uri`, else MLFLOW_TRACKING_URI, else SQLite in the store; and the root for artifacts.

    A server decides itself where artifacts go (None). For a database, MLflow would put them under the current
    directory, so they go below the store.
    """
    root = Path(store).absolute()
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root / 'mlflow.db'}"
    served = urlsplit(uri).scheme in ("http", "https") or uri.startswith("databricks")
    return uri, None if served else (root / "mlflow").as_uri()


class Mirror:
    """One study's writer to MLflow. Its methods return at once; `close` waits."""

    def __init__(
        self,
        uri: str,
        experiment: str,
        study_name: str,
        study_tags: Mapping[str, str] | None = None,
        artifact_root: str | None = None,
    ) -> None:
        self._connect = lambda: _Writer(uri, experiment, study_name, study_tags or {}, artifact_root)
        self._jobs: SimpleQueue[tuple[str, Job] | None] = SimpleQueue()
        self._warnings: list[str] = []
        self._thread = threading.Thread(target=self._work, name="mlflow-mirror", daemon=True)
        self._thread.start()

    def training(self, step: Mapping[str, Any]) -> None:
        """Mirror a published training step."""
        self._jobs.put((f"step {step['label']}", lambda writer: writer.write(training(step))))

    def watch(self, step: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> None:
        """Mirror points of the curve of a training that is still running."""
        curve = [{"step": line["done"], **line} for line in lines]
        self._jobs.put((f"step {step['label']}", lambda writer: writer.watch(training({**step, "curve": curve}))))

    def cell(self, row_group: Sequence[Row]) -> None:
        """Mirror result rows of any number of cells."""
        if row_group:
            self._jobs.put((f"{len(row_group)} result rows", partial(_write_cells, list(row_group))))

    def artifact(self, path: str | Path) -> None:
        """Copy a file or directory to the study's run (results, report)."""
        self._jobs.put((f"artifact {path}", lambda writer: writer.attach(Path(path))))

    def close(self, timeout: float | None = 60.0) -> list[str]:
        """Write what waits, for at most `timeout` seconds. Returns what went wrong, one sentence each."""
        self._jobs.put(None)
        self._thread.join(timeout)
        if self._thread.is_alive():
            return [
                *self._warnings,
                f"MLflow did not take everything within {timeout:g} s; `portllm track` writes the rest",
            ]
        return list(self._warnings)

    def _work(self) -> None:
        """The thread: one job after the other. MLflow is opened for the first: a study with nothing new opens none."""
        writer: _Writer | None = None
        failures = 0
        while (job := self._jobs.get()) is not None:
            if failures >= PATIENCE:
                continue
            what, write = job
            if writer is None and (writer := self._attempt("connecting", self._connect)) is None:
                failures = PATIENCE
            elif not self._attempt(what, partial(_done, write, writer)):
                failures += 1
            else:
                failures = 0
            if failures == PATIENCE:
                self._warnings.append("MLflow is left alone from here on; `portllm track` writes the rest")
        if writer is not None and failures < PATIENCE:
            self._attempt("closing", writer.finish)

    def _attempt(self, what: str, act: Callable[[], T]) -> T | None:
        try:
            return act()
        except Exception as error:  # tracking must never fail a study
            lines = str(error).strip().splitlines() or [""]
            # SQLAlchemy puts how it came to ask before what went wrong.
            said = next((line for line in lines if not line.startswith("(raised as a result")), lines[0])
            self._warnings.append(f"MLflow, {what}: {type(error).__name__}: {said}")
            return None


def rebuild(
    uri: str,
    experiment: str,
    study_name: str,
    study_tags: Mapping[str, str] | None = None,
    artifact_root: str | None = None,
    *,
    steps: Iterable[Mapping[str, Any]] = (),
    rows: Iterable[Row] = (),
    artifacts: Iterable[str | Path] = (),
) -> list[str]:
    """Write everything a study has that MLflow lacks. Returns warnings."""
    mirror = Mirror(uri, experiment, study_name, study_tags, artifact_root)
    for step in steps:
        mirror.training(step)
    for group in groups(rows):
        mirror.cell(group)
    for path in artifacts:
        mirror.artifact(path)
    return mirror.close(timeout=None)


def _done(write: Job, writer: _Writer) -> bool:
    write(writer)
    return True


def _write_cells(rows: Sequence[Row], writer: _Writer) -> None:
    for group in groups(rows):
        writer.write(cells(group))


@dataclass
class _Known:
    """What MLflow holds of one child run."""

    run_id: str
    start_ms: int
    finished: bool = False
    tags: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    """The newest value of each."""
    keys: dict[str, str] | None = None
    """Metric name → key of its cell, once keys.json was read or written here."""
    steps: set[int] = field(default_factory=set)
    """Steps of the curve that are there, of a training that is not finished."""

    def lacks(self, entry: Entry) -> list[Point]:
        """The entry's points that are not there.

        Of a curve that grew while it was watched that is any step, also before the last one: a driver may be killed
        with points in its hands. Of what is finished, the newest value tells.
        """
        differ = {name for name, value in _latest(entry).items() if self.metrics.get(name) != value}
        return [
            p
            for p in entry.points
            if (p.name in differ if p.step is None or self.finished else p.step not in self.steps)
        ]

    def has(self, entry: Entry) -> None:
        """All of the entry's points are there."""
        self.metrics |= _latest(entry)
        self.steps |= {p.step for p in entry.points if p.step is not None}


class _Writer:
    """MLflow's side: lives in the mirror's thread only."""

    def __init__(
        self, uri: str, experiment: str, study_name: str, study_tags: Mapping[str, str], artifact_root: str | None
    ) -> None:
        self._client = _client(uri)
        self._study = study_name
        self._experiment = self._open_experiment(experiment, artifact_root)
        self._parent = self._open_parent(study_tags)
        self._known = {run.data.tags[KEY]: self._read(run) for run in self._children() if KEY in run.data.tags}
        self._watched: set[str] = set()
        """Keys of trainings that were seen running and are not published."""

    def watch(self, entry: Entry) -> None:
        """Bring the curve of a running training up to date."""
        known = self._run_of(entry)
        if known.finished:
            return
        if entry.key in self._watched:
            self._send(known, known.lacks(entry))
        else:
            self._watched.add(entry.key)
            self._client.update_run(known.run_id, status="RUNNING")
            self._log(known, entry, {})
        known.has(entry)

    def write(self, entry: Entry) -> None:
        """Bring MLflow's run of this entry up to date: nothing, the missing parts, or all of it."""
        known = self._run_of(entry)
        tags = _union(known.tags, entry.tags) | ({PATH: str(entry.path)} if entry.path else {})
        if known.finished and not known.lacks(entry) and tags.items() <= known.tags.items():
            return
        self._log(known, entry, tags)
        known.has(entry)
        seconds = entry.wall_s or sum(value for name, value in known.metrics.items() if name.endswith(WALL))
        self._client.set_terminated(known.run_id, "FINISHED", end_time=known.start_ms + round(1000 * seconds))
        known.finished = True
        self._watched.discard(entry.key)
        known.tags |= tags

    def attach(self, path: Path) -> None:
        """A file or directory as the study's artifact."""
        if path.is_dir():
            self._client.log_artifacts(self._parent, str(path), path.name)
        else:
            self._client.log_artifact(self._parent, str(path))

    def finish(self) -> None:
        """What was seen running and did not get published has failed, or was interrupted: until it runs again."""
        for key in self._watched:
            self._client.set_terminated(self._known[key].run_id, "FAILED")
        self._client.set_terminated(self._parent, "FINISHED")

    def _log(self, known: _Known, entry: Entry, tags: Mapping[str, str]) -> None:
        from mlflow.entities import Param, RunTag

        params = [Param(*pair) for pair in entry.params.items()] if not known.finished else []
        changed = [RunTag(name, value) for name, value in tags.items() if known.tags.get(name) != value]
        self._send(known, known.lacks(entry), params, changed)
        self._client.log_dict(known.run_id, self._keys(known, entry), "keys.json")
        if entry.path is not None and not known.finished and _bytes(entry.path) < COPIED_BYTES:
            self._client.log_artifacts(known.run_id, str(entry.path), entry.path.parent.name)

    def _send(
        self, known: _Known, points: Sequence[Point], params: Sequence[Param] = (), tags: Sequence[RunTag] = ()
    ) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(p.name, p.value, known.start_ms + round(1000 * p.after_s), self._step(known, p)) for p in points
        ]
        batches = zip_longest(
            _chunks(metrics, METRICS_PER_REQUEST),
            _chunks(params, PARAMS_PER_REQUEST),
            _chunks(tags, TAGS_PER_REQUEST),
            fillvalue=(),
        )
        for some_metrics, some_params, some_tags in batches:
            self._client.log_batch(known.run_id, some_metrics, some_params, some_tags)

    def _step(self, known: _Known, point: Point) -> int:
        """A value without a step comes after those that are there: MLflow shows the newest."""
        if point.step is not None:
            return point.step
        if point.name not in known.metrics:
            return 0
        return 1 + max(metric.step for metric in self._client.get_metric_history(known.run_id, point.name))

    def _keys(self, known: _Known, entry: Entry) -> dict[str, Any]:
        """Content of keys.json; cells added to a run keep the keys of the cells that were there."""
        if entry.kind == "training":
            return dict(entry.keys)
        if known.keys is None:
            known.keys = self._read_keys(known) if known.finished else {}
        known.keys |= entry.keys["cells"]
        return {**entry.keys, "cells": known.keys}

    def _read_keys(self, known: _Known) -> dict[str, str]:
        with tempfile.TemporaryDirectory() as scratch:
            file = self._client.download_artifacts(known.run_id, "keys.json", scratch)
            return dict(json.loads(Path(file).read_text()).get("cells", {}))

    def _run_of(self, entry: Entry) -> _Known:
        """MLflow's run of this entry, made where there is none."""
        if entry.key not in self._known:
            self._known[entry.key] = self._create(entry)
        return self._known[entry.key]

    def _read(self, run: Run) -> _Known:
        info, data = run.info, run.data
        known = _Known(info.run_id, info.start_time, info.status == "FINISHED", dict(data.tags), dict(data.metrics))
        if not known.finished and "loss" in known.metrics:
            known.steps = {m.step for m in self._client.get_metric_history(known.run_id, "loss")}
        return known

    def _create(self, entry: Entry) -> _Known:
        start = round(1000 * ((entry.finished_at or time.time()) - entry.wall_s))
        own = {KEY: entry.key, STUDY: self._study, "portllm.kind": entry.kind, "mlflow.parentRunId": self._parent}
        tags = {**entry.tags, **own}
        run = self._client.create_run(self._experiment, start_time=start, tags=tags, run_name=shortened(entry.name))
        return _Known(run.info.run_id, start, tags=tags)

    def _open_experiment(self, name: str, artifact_root: str | None) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is not None and found.lifecycle_stage != "active":
            raise EngineError(
                f"experiment `{name}` was deleted there: restore it, or name another (tracking.experiment)"
            )
        if found is not None:
            return str(found.experiment_id)
        return str(self._client.create_experiment(name, artifact_location=artifact_root))

    def _open_parent(self, study_tags: Mapping[str, str]) -> str:
        """The study's run, found by its key and not by MLFLOW_RUN_ID, which belongs to whoever started this process."""
        key = digest({"study": self._study})
        found = self._search(f"tags.`{KEY}` = '{key}'")
        tags = {KEY: key, STUDY: self._study, "portllm.kind": "study", **study_tags}
        oldest = min(found, key=lambda run: run.info.start_time, default=None)
        if oldest is None:
            return str(
                self._client.create_run(self._experiment, tags=tags, run_name=shortened(self._study)).info.run_id
            )
        for name, value in tags.items():
            if oldest.data.tags.get(name) != value:
                self._client.set_tag(oldest.info.run_id, name, value)
        self._client.update_run(oldest.info.run_id, status="RUNNING")
        return str(oldest.info.run_id)

    def _children(self) -> list[Run]:
        return self._search(f"tags.`mlflow.parentRunId` = '{self._parent}'")

    def _search(self, query: str) -> list[Run]:
        runs: list[Run] = []
        token = None
        while True:
            page = self._client.search_runs([self._experiment], query, max_results=1000, page_token=token)
            runs += page
            if not (token := page.token):
                return runs


def _client(uri: str) -> MlflowClient:
    """MLflow, quiet: no usage reports, no log of each database migration; the directory of a SQLite file made."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    from mlflow import MlflowClient

    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri)


def _latest(entry: Entry) -> dict[str, float]:
    """The newest value of each metric."""
    return {point.name: point.value for point in sorted(entry.points, key=lambda p: p.step or 0)}


def _union(old: Mapping[str, str], new: Mapping[str, str]) -> dict[str, str]:
    """Tags with both sets of values: a run can come to stand under further coordinates."""
    return {
        name: joined({*value.split(","), *filter(None, old.get(name, "").split(","))}) for name, value in new.items()
    }


def _chunks(values: Iterable[T], size: int) -> Iterator[list[T]]:
    left = iter(values)
    while some := list(islice(left, size)):
        yield some


def _bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
