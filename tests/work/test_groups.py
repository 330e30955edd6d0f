"""A group's score is the one that lm-eval joins from its tasks."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from portllm.cli import main
from portllm.formats.lmeval_groups import Group, Joining, members
from portllm.work.groups import joined
from tests.toys import write_model, write_patch, write_rows, write_tasks

SIZES = {"mood": 20, "tone": 12, "temper": 7}
FEELINGS = {
    "group": "feelings",
    "task": ["mood", {"group": "inner", "task": ["tone", "temper"],
                      "aggregate_metric_list": [{"metric": "acc", "weight_by_size": False}]}],
    "aggregate_metric_list": [{"metric": "acc", "aggregation": "mean", "filter_list": "none"}],
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    root = write_tasks(tmp_path_factory.mktemp("world"), tuple(SIZES))
    for seed, (name, size) in enumerate(SIZES.items()):
        write_rows(root / "data" / name, random.Random(seed), 8, size)
    (root / "tasks" / "feelings.yaml").write_text(yaml.safe_dump(FEELINGS))
    write_model(root / "model")
    for seed in range(2):
        write_patch(root / f"patch{seed}", root / "model", seed)
    return root


def rows(world: Path, capsys: pytest.CaptureFixture[str], *arguments: object) -> list[dict[str, Any]]:
    places = ["--model", world / "model", "--data-root", world / "data", "--include-path", world / "tasks"]
    with pytest.raises(SystemExit) as end:
        main(["evaluate", *map(str, [*places, *arguments]), "--json"])
    assert not end.value.code
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


def of_lm_eval(world: Path, into: Path) -> dict[str, Any]:
    """What lm-eval itself says of the group, by its own loader and evaluator."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    into.mkdir()
    for file in (world / "tasks").glob("*.yaml"):
        config = yaml.safe_load(file.read_text())
        if "group" not in config:
            path = str(world / "data" / config["task"] / "validation.parquet")
            config["dataset_kwargs"] = {"data_files": {"validation": path}}
            del config["training_split"]
        (into / file.name).write_text(yaml.safe_dump(config))
    lm = HFLM(pretrained=str(world / "model"), device="cpu", dtype="float32", batch_size=4)
    manager = TaskManager(include_path=str(into), include_defaults=False)
    found = lm_eval.simple_evaluate(lm, tasks=["feelings"], task_manager=manager)
    return dict(found["groups"])


def test_groups_are_scored_as_lm_eval_scores_them(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = of_lm_eval(world, tmp_path / "tasks")
    capsys.readouterr()
    ours = {row["task"]: row for row in rows(world, capsys, "--tasks", "feelings")}
    assert list(ours) == ["mood", "tone", "temper", "feelings", "feelings::inner"]
    assert set(theirs) == {"feelings", "feelings::inner"}
    for name, found in theirs.items():
        assert (ours[name]["metric"], ours[name]["value"]) == ("acc", pytest.approx(found["acc,none"]))
        assert ours[name]["stderr"] == pytest.approx(found["acc_stderr,none"])
    assert (ours["feelings"]["n"], ours["feelings::inner"]["n"]) == (39, 19)
    assert ours["feelings"]["value"] != ours["feelings::inner"]["value"]


def test_every_patch_has_its_own_group_score_and_documents_are_kept_by_task(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import pyarrow.parquet as pq

    patches = [word for seed in range(2) for word in ("--patch", world / f"patch{seed}")]
    items = tmp_path / "items.parquet"
    found = rows(world, capsys, "--tasks", "feelings,mood", *patches, "--items", items)
    at = [(row["task"], Path(row["patches"][0]).name) for row in found if "feelings" in row["task"]]
    assert at == [(name, f"patch{seed}") for seed in range(2) for name in ("feelings", "feelings::inner")]
    assert set(pq.read_table(items)["task"].to_pylist()) == set(SIZES) and len(found) == 10


def test_a_group_whose_task_was_not_scored_has_no_score(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from portllm.work import cells

    evaluate = cells.evaluate

    def failing(recipe: Any, inputs: Any, *arguments: Any) -> Any:
        if inputs["requests"].name == "mood":
            raise RuntimeError("broken")
        return evaluate(recipe, inputs, *arguments)

    monkeypatch.setattr(cells, "evaluate", failing)
    with pytest.raises(SystemExit) as end:
        main(["evaluate", "--model", str(world / "model"), "--data-root", str(world / "data"), "--include-path",
              str(world / "tasks"), "--tasks", "feelings", "--json"])  # fmt: skip
    said = capsys.readouterr()
    assert [row["task"] for row in json.loads(said.out)] == ["tone", "temper", "feelings::inner"]
    assert end.value.code == 1 and "mood: RuntimeError: broken" in said.err


def summary(n: int, **metrics: tuple[float | None, float | None]) -> dict[str, Any]:
    found = [
        {"metric": name.partition("__")[0], "filter": name.partition("__")[2], "higher_is_better": True,
         "value": value, "stderr": stderr}
        for name, (value, stderr) in metrics.items()
    ]  # fmt: skip
    return {"metrics": found, "n": n, "num_fewshot": n % 2, "score_s": 1.5}


def test_filters_that_are_not_named_are_those_of_the_tasks_and_a_missing_metric_is_left_out() -> None:
    group = Group(
        "g", ("a", "b"), (Joining("em", None, True), Joining("f1", ("strict",), True), Joining("no", None, True))
    )
    parts = [
        summary(10, em__strict=(0.5, 0.1), em__flexible=(0.7, 0.1), f1__strict=(0.2, None)),
        summary(30, em__strict=(0.1, 0.1), em__flexible=(None, None), f1__strict=(0.6, 0.1)),
    ]
    found = joined(group, parts)
    assert [(m["metric"], m["filter"], m["primary"]) for m in found["metrics"]] == [
        ("em", "flexible", True), ("em", "strict", False), ("f1", "strict", False)]  # fmt: skip
    assert all(m["higher_is_better"] for m in found["metrics"])
    assert [m["value"] for m in found["metrics"]] == [None, pytest.approx(0.2), pytest.approx(0.5)]  # one is no number
    assert [m["stderr"] is None for m in found["metrics"]] == [True, False, True]
    assert (found["n"], found["num_fewshot"], found["score_s"]) == (40, 0, 3.0)


def test_lm_eval_s_own_groups_are_found_outer_ones_first() -> None:
    found = members("mmlu")
    assert [group.name for group in found.groups] == [
        "mmlu", "mmlu_stem", "mmlu_other", "mmlu_social_sciences", "mmlu_humanities"]  # fmt: skip
    assert found.groups[0].tasks == found.tasks and len(found.tasks) == 57
    assert sum(len(group.tasks) for group in found.groups[1:]) == 57
    assert members("ai2_arc").groups == () and members("sst2").groups == ()
