"""Groups of tasks in a study, their patches, and exports."""

from pathlib import Path

import pytest

from portllm.errors import SpecError
from portllm.resolve.resolver import open_study
from portllm.study.plan import make_plan
from tests.resolve.studies import keys
from tests.toys import write_patch


def test_a_group_stands_for_its_tasks_each_with_its_settings(copy):
    (copy.parent / "tasks" / "both.yaml").write_text("group: both\ntask: [mood, tone]\n")
    asked = "tasks=[{task: both, include_path: tasks, limit: 5}]"
    for _ in range(2):  # the second from what is remembered
        study, facts = open_study(copy, [asked])
        assert [(task.task, task.limit) for task in study.tasks] == [("mood", 5), ("tone", 5)]
        assert set(facts.tasks) == {"mood", "tone"}
    assert {cell.task for cell in make_plan(study, facts).cells} == {"mood", "tone"}
    with pytest.raises(SpecError, match="`mood` stands twice"):
        open_study(copy, ["tasks=[{task: both, include_path: tasks}, {task: mood, include_path: tasks}]"])


def test_patches_and_exports_of_a_group_are_those_of_its_tasks(copy):
    (copy.parent / "tasks" / "both.yaml").write_text("group: both\ntask: [mood, tone]\n")
    for seed, name in enumerate(("patch", "other")):
        write_patch(copy.parent / name, copy.parent / "model", seed)
    group = ["tasks=[{task: both, include_path: tasks}]", "arms=[none, port]", "finetune=null"]

    def planned(*overrides):
        found = make_plan(*open_study(copy, [*group, *overrides]))
        assert "finetune" not in {step.stage for step in found.steps.values()}
        roots = {given.key: Path(given.path).name for given in found.givens.values()}
        return found, {cell.task: roots[cell.patches[0]] for cell in found.cells if cell.arm == "port"}

    found, patches = planned("patches={both: patch}", "export=[{task: both, arm: port, t: 1}]")
    assert patches == {"mood": "patch", "tone": "patch"}
    assert len([step for step in found.steps.values() if step.stage == "export"]) == 1  # the same weights for both
    assert planned("patches={both: patch, tone: other}")[1] == {"mood": "patch", "tone": "other"}
    assert planned("patches={mood: other, tone: patch}")[1] == {"mood": "other", "tone": "patch"}
    with pytest.raises(SpecError, match="finetune: arms port, warm and refit train patches"):
        planned("patches={mood: other}")


def test_an_export_of_nothing_is_an_error(copy):
    for export, said in (
        ("{task: moood}", "task moood"),
        ("{t: 9, arm: port}", "t 9"),
        ("{arm: none, seed: 0}", "arm none, seed 0"),
    ):
        with pytest.raises(SpecError, match=f"export: no planned cell has {said}$"):
            keys(copy, f"export=[{export}]")
    assert keys(copy, "export=[{arm: none, t: 1}]")
