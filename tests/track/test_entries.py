"""What the mirror writes, before MLflow sees it."""

from typing import Any

from portllm.track.entries import NAME_LENGTH, PARAM_LENGTH, cells, clean, flat, groups, joined, shortened, training


def row(**other: Any) -> dict[str, Any]:
    plain = {
        "model": "tiny", "lineage": "lora", "t": 1, "update": "lora", "update_seed": 0, "task": "sst2",
        "num_fewshot": None, "arm": "port", "source_model": "tiny", "source_t": 0, "rank": 8, "seed": 1,
        "patches": ["patch"], "apply": "merged", "dtype": "float32", "metric": "acc", "filter": "none",
        "primary": True, "higher_is_better": True,
        "value": 0.8, "stderr": 0.01, "n": 100, "key": "cell", "version_key": "version", "wall_s": 2.0,
    }  # fmt: skip
    return {**plain, **other}


def test_cells_of_one_version_and_patches_are_one_run() -> None:
    rows = [row(), row(task="rte", key="other"), row(patches=["b"]), row(apply="adapter"), row(version_key="w")]
    assert [len(group) for group in groups(rows)] == [2, 1, 1, 1]


def test_metrics_are_named_task_and_metric_and_tell_filters_and_shots_apart() -> None:
    rows = [
        row(), row(num_fewshot=5), row(task="gsm8k", metric="exact_match", filter="strict-match", stderr=None),
        row(task="mine/own"),
    ]  # fmt: skip
    names = [point.name for point in cells(rows).points]
    assert names == [
        "sst2/acc", "sst2/acc_stderr", "sst2.5shot/acc", "sst2.5shot/acc_stderr", "gsm8k/exact_match.strict-match",
        "mine_own/acc", "mine_own/acc_stderr", "sst2/wall_s", "sst2.5shot/wall_s", "gsm8k/wall_s", "mine_own/wall_s",
    ]  # fmt: skip


def test_a_run_under_several_coordinates_has_them_all_as_tags() -> None:
    entry = cells([row(t=0, lineage="lora"), row(t=0, lineage="full", arm="refit")])
    assert entry.tags["lineage"] == "full,lora"
    assert entry.tags["arm"] == "port,refit"
    assert entry.tags["t"] == "0"
    assert joined(["b", "a"]) == "a,b"


def test_a_training_has_its_recipe_as_dotted_params_and_its_curve_by_step() -> None:
    entry = training(
        {
            "stage": "finetune", "key": "k", "label": "finetune:x", "coordinates": {"t": 1, "seed": None},
            "wall_s": 3.0, "devices": 2,
            "summary": {"tokens": 10, "zero": None, "note": "text", "loss_last": float("nan")},
            "curve": [{"step": 1, "loss": 2.0, "grad_norm": None}, {"step": 2, "loss": float("inf")}],
            "recipe": {"lora": {"rank": 8, "targets": ["q", "v"], "none": None}, "text": "y" * 7000},
        }
    )  # fmt: skip
    assert entry.params == {"lora.rank": "8", "lora.targets": "['q', 'v']", "text": "y" * PARAM_LENGTH}
    assert [(p.name, p.value, p.step) for p in entry.points] == [
        ("loss", 2.0, 1), ("summary/wall_s", 3.0, None), ("summary/devices", 2.0, None), ("summary/tokens", 10.0, None),
    ]  # fmt: skip
    assert entry.tags == {"stage": "finetune", "t": "1"}


def test_names_are_made_fit_for_mlflow() -> None:
    assert clean("a,b/c:d") == "a_b/c_d"
    assert clean("../x") == "_../x"
    assert clean("a//b") == "a/_/b"
    assert len(clean("x" * 999)) == len(shortened("x" * 400)) == NAME_LENGTH
    assert clean("x" * 300 + "/acc") != clean("x" * 300 + "/acc_norm") != clean("x" * 301 + "/acc_norm")
    points = cells([row(task="x" * 246), row(task="x" * 246, metric="acc_norm")]).points
    assert len({point.name for point in points}) == 5 and all(len(point.name) <= NAME_LENGTH for point in points)
    assert flat({"a": {"b c": {}}}) == {}
