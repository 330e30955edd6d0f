"""Which workers the driver starts, node by node: its choices alone, without a Ray."""

from types import SimpleNamespace

import pytest

from portllm.engine import runner
from portllm.engine.pool import Budget, Size
from portllm.engine.progress import Progress
from portllm.engine.runner import Runner
from portllm.store.store import Store
from portllm.study.resources import Layout
from portllm.study.steps import Plan, Step


@pytest.fixture(autouse=True)
def workers_of_air(monkeypatch):
    """Workers that begin and never end."""
    run = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda job: object()))
    monkeypatch.setattr(runner, "start_worker", lambda *_: SimpleNamespace(run=run, end=run.options()))
    monkeypatch.setattr(runner, "job_for", lambda *_: None)


def running(tmp_path, nodes, **wanted):
    """Labels of what runs once everything was dispatched; `wanted`: name=(stage, count, threads, gpus)."""
    steps = [
        Step(f"{name}{i}", stage, f"{name}{i}", None, {"root": "g"}, Layout(threads=threads, gpus=gpus), {})
        for name, (stage, count, threads, gpus) in wanted.items()
        for i in range(count)
    ]
    plan = Plan("x", {step.key: step for step in steps}, (), {})
    driver = Runner(plan, Store(tmp_path).create(), Budget(nodes), Progress(1, quiet=True))
    for _ in range(3):
        driver._dispatch()
    return sorted(driver.schedule.running)


def test_trainings_that_wait_for_a_gpu_leave_cpus_to_evaluations(tmp_path):
    found = running(tmp_path, {"a": Size(8, 1)}, train=("finetune", 4, 1, 1), score=("evaluate", 4, 1, 0))
    assert found == ["score0", "score1", "score2", "train0"]  # the last cell is left to one of them


def test_cpus_are_kept_for_no_training_that_lacks_a_gpu(tmp_path):
    found = running(tmp_path, {"a": Size(16, 1)}, train=("finetune", 4, 8, 1), score=("evaluate", 4, 8, 0))
    assert found == ["score0", "train0"]


def test_what_waits_at_one_node_keeps_nothing_at_another(tmp_path):
    nodes = {"a": Size(16, 0), "b": Size(4, 0)}
    found = running(tmp_path, nodes, train=("finetune", 2, 16, 0), score=("evaluate", 4, 1, 0))
    assert found == ["score0", "score1", "score2", "train0"]


def test_gpus_are_kept_for_a_training_that_lacks_some(tmp_path):
    nodes = {"a": Size(16, 3)}
    found = running(tmp_path, nodes, train=("finetune", 2, 1, 2), score=("evaluate", 4, 1, 1))
    assert found == ["train0"]


def test_a_training_that_waits_for_cpus_is_not_overtaken(tmp_path):
    found = running(tmp_path, {"a": Size(6, 0)}, train=("finetune", 2, 4, 0), score=("evaluate", 4, 1, 0))
    assert found == ["train0"]


def test_a_size_that_no_node_has_keeps_no_place(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "require_fits", lambda *_: None)  # the node that it fitted is gone since
        found = running(tmp_path, {"a": Size(4, 0)}, train=("finetune", 1, 8, 0), score=("evaluate", 4, 1, 0))
    assert found == ["score0", "score1", "score2"]
