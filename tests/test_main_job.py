"""The whole tool on a toy model: real Ray, DeepSpeed, PEFT, lm-eval and MLflow, through the command line."""

import json
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch

from tests.toys import portllm, write_model, write_patch, write_world


def record(store, stage):
    return [json.loads(p.read_text()) for p in sorted(store.glob(f"artifacts/{stage}/*/record.json"))]


def test_one_run_makes_every_step_of_the_plan(finished):
    world, store, report = finished
    planned = json.loads(portllm("plan", world, "--store", store, "--json"))
    assert report["failed"] == {} and report["steps_executed"] == len(planned["steps"])
    assert all(step["published"] for step in planned["steps"])


def test_model_loads_for_evaluation_are_bounded_by_versions_times_evaluators(finished):
    _, _, report = finished
    assert report["versions"] == 3 and 1 <= report["evaluators"] <= 2
    assert report["evaluation_loads"] <= report["versions"] * report["evaluators"]


def test_the_results_are_a_list_with_a_row_per_coordinate(finished):
    world, store, _ = finished
    rows = json.loads(portllm("results", world, "--store", store, "--format", "json"))
    arms = {(r["lineage"], r["t"], r["arm"]) for r in rows}
    assert arms == {(line, t, arm) for line in ("soft", "hard") for t in (0, 1) for arm in ("none", "port", "refit")}
    zero = {r["arm"]: r for r in rows if r["t"] == 0 and r["lineage"] == "soft"}
    assert zero["port"]["key"] == zero["refit"]["key"] != zero["none"]["key"]
    assert all(r["n"] == 20 and 0 <= r["value"] <= 1 for r in rows)
    table = portllm("results", world, "--store", store)
    assert "none" in table and "refit" in table and "mood" in table


def test_the_weights_alone_say_what_rounding_and_updates_do_to_a_patch(finished):
    world, store, _ = finished
    rows = json.loads(portllm("results", world, "--store", store, "--diagnose", "--format", "json"))
    assert [(r["lineage"], r["t"], r["task"], r["rank"]) for r in rows] == [
        ("soft", 1, "mood", 2),
        ("hard", 1, "mood", 2),
    ]
    for row in rows:
        assert row["frobenius"] > 0 and 0 < row["update_size"] < 1 and 0 <= row["overlap_out"] <= 1
        assert row["residual_of_patch"] > 0, "the refit is another patch"
    table = portllm("results", world, "--store", store, "--diagnose")
    assert "‖Δθ‖" in table and "mood r2 s0" in table


def test_every_training_went_through_deepspeed(finished):
    _, store, _ = finished
    trained = record(store, "update") + record(store, "finetune")
    assert len(trained) == 5
    for one in trained:
        assert one["summary"]["zero"] == 0 and one["summary"]["world"] == 1
        assert one["summary"]["deepspeed"] and one["summary"]["trainable_parameters"] > 0


def test_a_patch_is_a_plain_adapter_for_peft(finished):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    world, store, _ = finished
    for patch in store.glob("artifacts/finetune/*"):
        base = AutoModelForCausalLM.from_pretrained(world.parent / "model")
        PeftModel.from_pretrained(base, patch)
        assert (patch / "provenance.json").is_file()


def test_a_lora_update_is_a_delta_and_a_full_one_a_model(finished):
    _, store, _ = finished
    kinds = {(p / "adapter_model.safetensors").is_file(): p for p in store.glob("artifacts/update/*")}
    assert set(kinds) == {True, False}
    assert not (kinds[True] / "model.safetensors").exists() and (kinds[False] / "model.safetensors").is_file()


def test_the_exported_model_is_the_one_that_was_scored(finished):
    """The export loads as a plain model and scores the same, item by item."""
    world, store, _ = finished
    exported = next(store.glob("artifacts/export/*"))
    rows = json.loads(portllm("results", world, "--store", store, "--format", "json"))
    port = next(r for r in rows if (r["lineage"], r["t"], r["arm"]) == ("hard", 1, "port"))
    items = world.parent / "exported.parquet"
    portllm("evaluate", "--model", exported, "--tasks", "mood", "--include-path", world.parent / "tasks",
            "--data-root", world.parent / "data", "--items", items)  # fmt: skip
    scores = [
        pyarrow.parquet.read_table(file)["choice_loglikelihoods"].to_pylist()
        for file in (items, store / "artifacts" / "evaluate" / port["key"] / "items.parquet")
    ]
    assert np.allclose(*scores, atol=1e-5, rtol=0)  # the weights are equal to the bit; memory alignment may differ


def test_the_report_is_one_page_that_loads_nothing(finished):
    world, store, _ = finished
    path = Path(portllm("report", world, "--store", store).strip())
    page = path.read_text(encoding="utf-8")
    assert "mood" in page and "<svg" in page
    assert 'src="http' not in page and 'href="http' not in page


def test_mlflow_holds_the_runs_and_a_lost_one_is_rebuilt(finished):
    from mlflow.tracking import MlflowClient

    world, store, _ = finished
    assert _runs(MlflowClient(f"sqlite:///{store / 'mlflow.db'}")) == _runs_of(world, store)
    (store / "mlflow.db").unlink()
    portllm("track", world, "--store", store)
    assert _runs(MlflowClient(f"sqlite:///{store / 'mlflow.db'}")) == _runs_of(world, store)
    portllm("track", world, "--store", store)
    assert _runs(MlflowClient(f"sqlite:///{store / 'mlflow.db'}")) == _runs_of(world, store), "nothing stands twice"


def _runs(client):
    experiment = client.get_experiment_by_name("toy")
    return len(client.search_runs([experiment.experiment_id], max_results=1000))


def _runs_of(world, store):
    """A parent, a child per training, a child per (version, patches)."""
    rows = json.loads(portllm("results", world, "--store", store, "--format", "json"))
    return 1 + 5 + len({(r["version_key"], tuple(r["patches"])) for r in rows})


def test_a_second_run_executes_nothing_and_is_quick(finished):
    world, store, _ = finished
    begin = time.monotonic()
    report = json.loads(portllm("run", world, "--store", store, "--yes", "--json"))
    assert report["steps_executed"] == 0 and report["process_starts"] == 0
    assert time.monotonic() - begin < 5


def test_a_run_killed_after_its_last_step_gets_its_report_from_the_next(finished):
    from mlflow.tracking import MlflowClient

    world, store, _ = finished
    report, table = (store / "studies" / "toy" / name for name in ("report.html", "results.parquet"))
    for file in (report, table):
        file.unlink()
    assert json.loads(portllm("run", world, "--store", store, "--yes", "--json"))["steps_executed"] == 0
    assert report.is_file() and table.is_file()
    assert _runs(MlflowClient(f"sqlite:///{store / 'mlflow.db'}")) == _runs_of(world, store)


def test_an_edited_study_gets_its_report_from_the_next_run(finished):
    world, store, _ = finished
    report = store / "studies" / "toy" / "report.html"
    shown = []
    for margin in ("0.1", "0.1", "0.02"):
        portllm("run", world, "--store", store, "--yes", "-o", f"report.margin={margin}")
        shown.append((report.stat().st_mtime_ns, "below 10 points" in report.read_text()))
    assert shown[0] == shown[1] and [ten for _, ten in shown] == [True, True, False]


def test_damaged_files_are_named_with_what_to_do(finished, tmp_path):
    import shutil

    world, store, _ = finished
    shutil.copytree(store, tmp_path / "s")
    rows = json.loads(portllm("results", world, "--store", store, "--format", "json"))
    one, other = sorted({row["key"] for row in rows})[:2]  # other tests of this module leave cells of other studies
    files = [
        tmp_path / "s" / "artifacts" / "evaluate" / name for name in (f"{one}/results.json", f"{other}/record.json")
    ]
    for file in files:
        file.chmod(0o644)
        file.write_text("")
    for command in ("results", "verify"):
        error = portllm(command, world, "--store", tmp_path / "s", code=1)
        assert "the next `portllm run` makes" in error and "Traceback" not in error
    assert all(file.parent.name in error for file in files)  # verify names both


def test_tracking_that_fails_is_an_error_of_track(finished):
    world, store, _ = finished
    assert "error: " in portllm("track", world, "--store", store, code=1, MLFLOW_TRACKING_URI="bogus://x")


def test_a_cluster_that_does_not_answer_is_one_error(finished, tmp_path):
    world, _, _ = finished
    error = portllm("run", world, "--store", tmp_path / "s", "--yes", "--address", "127.0.0.1:9", code=1)
    assert error.startswith("error: no Ray at 127.0.0.1:9: Connection refused") and error.count("\n") == 1


def test_a_task_added_later_runs_only_its_own_cells(finished):
    world, store, _ = finished
    more = ["-o", "tasks=[{task: mood, include_path: tasks}, {task: tone, include_path: tasks}]",
            "-o", "arms=[none]", "-o", "export=[]", "-o", "diagnose=false"]  # fmt: skip
    report = json.loads(portllm("run", world, "--store", store, "--yes", "--json", *more))
    assert report["steps_executed"] > 0 and all("tone" in label for label in report["executed"])


def test_one_step_runs_without_ray(finished, tmp_path):
    world, _, _ = finished
    portllm("step", world, "requests mood", "--store", tmp_path)
    error = portllm("step", world, "evaluate soft t=1 mood none", "--store", tmp_path, code=1)
    assert "update soft t=1" in error
    if not torch.cuda.is_available():  # a step that was given a GPU never computes on a CPU without a word
        gpu = ("-o", "resources={evaluate: {gpus: 1}}")
        error = portllm("step", world, "evaluate m t=0 mood none", *gpu, "--store", tmp_path, code=1)
        assert "was given a GPU" in error and "resources.evaluate.gpus=0" in error


def test_verify_finds_a_flipped_bit(finished, tmp_path):
    import shutil

    world, store, _ = finished
    shutil.copytree(store, tmp_path / "s")
    assert "intact" in portllm("verify", world, "--store", tmp_path / "s")
    for file in (tmp_path / "s").glob("artifacts/finetune/*/adapter_model.safetensors"):
        file.chmod(0o644)
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    assert "adapter_model.safetensors" in portllm("verify", world, "--store", tmp_path / "s", code=1)


def test_given_versions_and_patches_train_nothing(tmp_path):
    world = write_world(
        tmp_path / "w",
        """
name: given
data_root: data
models: {m: {path: model}}
lineages: {shipped: {model: m, updates: [{path: v1}, {path: v2}]}}
tasks: [{task: mood, include_path: tasks}]
patches: {mood: patch}
arms: [none, port]
diagnose: true
tracking: {enabled: false}
""",
    )
    write_model(world.parent / "v1", seed=1)
    write_model(world.parent / "v2", seed=2)
    write_patch(world.parent / "patch", world.parent / "model")
    report = json.loads(portllm("run", world, "--store", tmp_path / "s", "--yes", "--json"))
    assert {label.split()[0] for label in report["executed"]} == {"requests", "evaluate", "diagnose"}
    rows = json.loads(portllm("results", world, "--store", tmp_path / "s", "--format", "json"))
    assert [(r["t"], r["arm"], r["update"], r["rank"]) for r in rows] == [
        (0, "none", None, None),
        (0, "port", None, 2),
        (1, "none", "given", None),
        (1, "port", "given", 2),
        (2, "none", "given", None),
        (2, "port", "given", 2),
    ]


@pytest.mark.parametrize(
    "override",
    [
        "models.m.pth=x",
        "models.m.path=nowhere",
        "finetune.rank=0",
        "tasks=[nope]",
        "corpora.c.path=none.txt",
        "models.m={hub: a/b}",
        "resources={finetune: {workers: 64}}",
        "resources={evaluate: {gpus: 1}}",
    ],
)
def test_bad_input_is_one_error_exit_code_two_and_nothing_written(finished, tmp_path, override):
    world, _, _ = finished
    error = portllm("run", world, "--store", tmp_path / "s", "--yes", "-o", override, code=2)
    assert error.startswith("error: ") and "Traceback" not in error and error.count("error: ") == 1
    assert not (tmp_path / "s").exists()
