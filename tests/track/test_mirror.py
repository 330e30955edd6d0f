"""The mirror against a real MLflow on SQLite, read back through its client."""

import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from portllm.track import mlflow_mirror
from portllm.track.mlflow_mirror import Mirror, destination, rebuild
from tests.track.test_entries import row


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database: its migrations take seconds, so they run once."""
    from mlflow import MlflowClient

    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def store(tmp_path: Path, migrated: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "store").mkdir()
    shutil.copy(migrated, tmp_path / "store" / "mlflow.db")
    yield tmp_path / "store"
    assert not Path("mlruns").exists()


STEPS = 700


def step(**other: Any) -> dict[str, Any]:
    curve = [
        {"step": i, "loss": 3 - i / 500, "learning_rate": 1e-3, "grad_norm": 1.0, "elapsed_s": i / 100}
        for i in range(1, STEPS + 1)
    ]
    plain = {
        "stage": "finetune", "key": "f" * 64, "label": "finetune:sst2/s1", "wall_s": 12.0, "devices": 1,
        "coordinates": {"model": "tiny", "lineage": "lora", "t": 1, "task": "sst2", "rank": 8, "seed": 1},
        "summary": {"trainable_parameters": 1000, "tokens": 5000, "loss_last": 1.6}, "curve": curve,
        "recipe": {"lora": {"rank": 8}, **{f"many{i}": i for i in range(150)}},
    }  # fmt: skip
    return {**plain, **other}


def rows() -> list[dict[str, Any]]:
    other = row(task="rte", key="cell2", value=0.6)
    return [row(), other, row(arm="none", patches=[], rank=None, seed=None, key="cell3", value=0.5)]


def everything(store: Path, **parts: Any) -> list[str]:
    uri, root = destination(store)
    return rebuild(uri, "experiment", "study", {"owner": "me"}, root, **({"steps": [step()], "rows": rows()} | parts))


class Read:
    """What MLflow holds."""

    def __init__(self, store: Path) -> None:
        from mlflow import MlflowClient

        self.client = MlflowClient(destination(store)[0])
        experiment = self.client.get_experiment_by_name("experiment")
        assert experiment is not None
        self.runs = list(self.client.search_runs([experiment.experiment_id]))
        self.parents = [run for run in self.runs if run.data.tags["portllm.kind"] == "study"]
        self.training = [run for run in self.runs if run.data.tags["portllm.kind"] == "training"]
        self.cells = [run for run in self.runs if run.data.tags["portllm.kind"] == "cells"]

    def keys(self, run: Any) -> dict[str, Any]:
        return dict(json.loads(Path(self.client.download_artifacts(run.info.run_id, "keys.json")).read_text()))

    def picture(self) -> dict[str, Any]:
        """All that matters, run by run, apart from identities MLflow makes up."""
        own = {"mlflow.user", "mlflow.source.name", "mlflow.source.type", "mlflow.parentRunId"}
        return {
            run.data.tags["portllm.key"]: (
                run.info.run_name,
                run.info.status,
                run.data.metrics,
                run.data.params,
                {name: value for name, value in run.data.tags.items() if name not in own},
            )
            for run in self.runs
        }


def test_a_study_is_a_parent_with_a_run_per_training_and_per_version_and_patches(store: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    report.write_text("<p>")
    assert everything(store, artifacts=[report]) == []
    read = Read(store)
    assert (len(read.parents), len(read.training), len(read.cells)) == (1, 1, 2)
    parent = read.parents[0]
    assert parent.data.tags["owner"] == "me"
    assert {run.data.tags.get("mlflow.parentRunId") for run in read.runs} == {None, parent.info.run_id}
    assert {run.data.tags["portllm.study"] for run in read.runs} == {"study"}
    assert {run.info.status for run in read.runs} == {"FINISHED"}
    assert [file.path for file in read.client.list_artifacts(parent.info.run_id)] == ["report.html"]


def test_a_training_has_its_whole_curve_params_and_ledger(store: Path) -> None:
    everything(store)
    read = Read(store)
    run = read.training[0]
    losses = read.client.get_metric_history(run.info.run_id, "loss")
    assert [point.step for point in losses] == list(range(1, STEPS + 1))
    assert losses[-1].value == pytest.approx(3 - STEPS / 500)
    assert [point.timestamp - run.info.start_time for point in losses] == [10 * i for i in range(1, STEPS + 1)]
    assert run.data.metrics["summary/trainable_parameters"] == 1000
    assert run.data.params["lora.rank"] == "8"
    assert len(run.data.params) == 151
    assert run.data.tags["task"] == "sst2"
    assert run.info.end_time - run.info.start_time == 12_000
    assert read.keys(run)["key"] == "f" * 64


def test_cells_have_scores_as_metrics_coordinates_as_tags_and_keys_in_an_artifact(store: Path) -> None:
    everything(store)
    read = Read(store)
    ported = next(run for run in read.cells if run.data.tags["arm"] == "port")
    scores = {"sst2/acc": 0.8, "sst2/acc_stderr": 0.01, "rte/acc": 0.6, "rte/acc_stderr": 0.01}
    assert ported.data.metrics == scores | {"sst2/wall_s": row()["wall_s"], "rte/wall_s": row()["wall_s"]}
    assert ported.data.tags["task"] == "rte,sst2"
    assert ported.data.params == {"version": "version", "patch1": "patch", "apply": "merged", "dtype": "float32"}
    assert read.keys(ported)["cells"] == {"sst2/acc": "cell", "rte/acc": "cell2"}


def test_a_second_time_adds_nothing(store: Path) -> None:
    everything(store)
    before, artifacts = Read(store).picture(), sorted((store / "mlflow").rglob("*"))
    everything(store)
    assert Read(store).picture() == before
    assert sorted((store / "mlflow").rglob("*")) == artifacts
    read = Read(store)
    assert len(read.client.get_metric_history(read.training[0].info.run_id, "loss")) == STEPS


def test_a_lost_database_is_rebuilt(store: Path, migrated: Path) -> None:
    everything(store)
    before = Read(store).picture()
    shutil.copy(migrated, store / "mlflow.db")
    assert everything(store) == []
    assert Read(store).picture() == before


def test_a_run_cut_off_in_the_middle_is_completed(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    everything(store, steps=[], rows=[])
    real, calls = MlflowClient.log_batch, []

    def dies(self: Any, run_id: str, *batch: Any) -> None:
        calls.append(run_id)
        if len(calls) > 1:
            raise OSError("killed here")
        real(self, run_id, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", dies)
        warnings = everything(store, rows=[])
    assert "killed here" in warnings[0]
    assert [run.info.status for run in Read(store).training] == ["RUNNING"]
    assert everything(store) == []
    read = Read(store)
    assert [run.info.status for run in read.training] == ["FINISHED"]
    assert [p.step for p in read.client.get_metric_history(read.training[0].info.run_id, "loss")] == list(
        range(1, STEPS + 1)
    )


def test_cells_that_come_later_join_the_run_of_their_version_and_patches(store: Path) -> None:
    everything(store)
    later = [row(task="wnli", key="cell4", value=0.4), row(lineage="twin")]
    everything(store, steps=[], rows=later)
    read = Read(store)
    assert len(read.cells) == 2
    ported = next(run for run in read.cells if run.data.tags["arm"] == "port")
    assert set(read.keys(ported)["cells"]) == {"sst2/acc", "rte/acc", "wnli/acc"}
    assert ported.data.tags["task"] == "rte,sst2,wnli"
    assert ported.data.tags["lineage"] == "lora,twin"
    assert ported.info.end_time - ported.info.start_time == 3 * 1000 * row()["wall_s"]


def test_a_score_that_changed_is_shown_newest(store: Path) -> None:
    """The same task with another limit is another cell under the same name."""
    everything(store, steps=[])
    everything(store, steps=[], rows=[row(value=0.7, key="limited")])
    everything(store, steps=[], rows=[row(value=0.7, key="limited")])
    read = Read(store)
    ported = next(run for run in read.cells if run.data.tags["arm"] == "port")
    assert ported.data.metrics["sst2/acc"] == 0.7
    assert [p.value for p in read.client.get_metric_history(ported.info.run_id, "sst2/acc")] == [0.8, 0.7]
    assert read.keys(ported)["cells"]["sst2/acc"] == "limited"


def test_a_small_patch_is_copied_and_a_large_one_only_named(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / "finetune" / name for name in ("small", "large")]
    for path, size in zip(paths, (10, 1000), strict=True):
        path.mkdir(parents=True)
        (path / "adapter_model.safetensors").write_bytes(b"x" * size)
    monkeypatch.setattr(mlflow_mirror, "COPIED_BYTES", 100)
    everything(store, steps=[step(key=p.name, label=p.name, path=str(p)) for p in paths], rows=[])
    read = Read(store)
    held = {run.info.run_name: [f.path for f in read.client.list_artifacts(run.info.run_id)] for run in read.training}
    assert held == {"small": ["finetune", "keys.json"], "large": ["keys.json"]}
    assert {run.data.tags["portllm.path"] for run in read.training} == set(map(str, paths))


def test_a_deleted_experiment_is_told_with_what_to_do(store: Path) -> None:
    everything(store)
    client = Read(store).client
    client.delete_experiment(client.get_experiment_by_name("experiment").experiment_id)
    (said, *_) = everything(store)
    assert "experiment `experiment` was deleted there: restore it, or name another" in said


def test_the_environments_run_is_left_alone(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "of somebody else")
    assert everything(store) == []
    read = Read(store)
    assert len(read.parents) == 1
    assert read.parents[0].info.run_id != "0" * 32


def test_two_studies_with_one_experiment_have_a_parent_each(store: Path) -> None:
    everything(store)
    uri, root = destination(store)
    rebuild(uri, "experiment", "it's another", {}, root, steps=[step()])
    read = Read(store)
    assert len(read.parents) == 2
    assert len(read.training) == 2


def test_nothing_waits_for_mlflow_and_close_says_what_is_missing(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    monkeypatch.setattr(mlflow_mirror, "_client", lambda uri: gate.wait(20))
    mirror = Mirror("sqlite:///unused", "experiment", "study")
    started = time.monotonic()
    for _ in range(100):
        mirror.training(step())
    mirror.cell(rows())
    assert time.monotonic() - started < 3
    assert "within 0.1 s" in mirror.close(timeout=0.1)[-1]
    gate.set()


def test_an_unusable_mlflow_is_a_warning_not_an_error(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    mirror = Mirror(f"sqlite:///{blocked}/mlflow.db", "experiment", "study")
    mirror.cell(rows())
    mirror.training(step())
    warnings = mirror.close(timeout=60)
    assert len(warnings) == 2
    assert warnings[0].startswith("MLflow, connecting")
    assert "portllm track" in warnings[1]


def test_a_study_with_nothing_new_opens_no_mlflow(tmp_path: Path) -> None:
    mirror = Mirror(f"sqlite:///{tmp_path}/mlflow.db", "experiment", "study")
    mirror.cell([])
    assert mirror.close(timeout=5) == []
    assert list(tmp_path.iterdir()) == []


def test_the_destination_is_the_store_unless_one_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert destination(tmp_path) == (f"sqlite:///{tmp_path}/mlflow.db", f"file://{tmp_path}/mlflow")
    assert destination(tmp_path, "http://server:5000") == ("http://server:5000", None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://database")
    assert destination(tmp_path) == ("postgresql://database", f"file://{tmp_path}/mlflow")


def lines(first: int, last: int) -> list[dict[str, Any]]:
    return [{"done": i, "total": STEPS, **step()["curve"][i - 1]} for i in range(first, last + 1)]


def begun() -> dict[str, Any]:
    return {name: value for name, value in step().items() if name not in ("curve", "summary", "wall_s", "devices")}


def watched(store: Path, *parts: tuple[int, int], then: dict[str, Any] | None = None) -> None:
    """A driver that sees parts of a curve, and the end if there is one."""
    uri, root = destination(store)
    mirror = Mirror(uri, "experiment", "study", artifact_root=root)
    for part in parts:
        mirror.watch(begun(), lines(*part))
    if then is not None:
        mirror.training(then)
    assert mirror.close() == []


def losses(read: Read) -> list[int]:
    return [point.step for point in read.client.get_metric_history(read.training[0].info.run_id, "loss")]


def test_a_curve_seen_while_it_grew_is_written_once(store: Path) -> None:
    watched(store, (1, 5), (6, 300), then=step())
    read = Read(store)
    assert losses(read) == list(range(1, STEPS + 1))
    assert read.training[0].info.status == "FINISHED"
    assert read.training[0].data.metrics["summary/tokens"] == 5000
    assert read.training[0].data.params["lora.rank"] == "8"


def test_a_training_that_goes_on_under_another_driver_goes_on_in_its_run(store: Path) -> None:
    """Killed at step 9, resumed from a checkpoint of step 6; killed again, and resumed from one that was never told of:
    its curve has every step once, of a rate that never changes, too."""
    watched(store, (1, 9))
    assert (losses(Read(store)), Read(store).training[0].info.status) == (list(range(1, 10)), "FAILED")
    watched(store, (7, 12), (13, 20))
    watched(store, (31, 40), then=step())
    read = Read(store)
    assert losses(read) == list(range(1, STEPS + 1))
    rates = read.client.get_metric_history(read.training[0].info.run_id, "learning_rate")
    assert [point.step for point in rates] == list(range(1, STEPS + 1))
    assert [run.info.status for run in read.training] == ["FINISHED"]
    before = read.picture()
    assert everything(store) == [] and Read(store).picture()["f" * 64] == before["f" * 64]
