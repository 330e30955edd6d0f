"""Which workers the driver starts, node by node: its choices alone, without a Ray."""

import gc
import weakref
from types import SimpleNamespace

import numpy as np
import pytest

from portllm.engine import runner
from portllm.engine.execute import Job, attempted
from portllm.engine.gang import WorkerDied, _cause
from portllm.engine.pool import Budget, Size
from portllm.engine.progress import Progress
from portllm.engine.runner import Runner
from portllm.engine.workers import listed
from portllm.errors import EngineError, StageError
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
    """Labels of what runs once everything was dispatched; `wanted`: name=(stage, count, threads, gpus[, workers])."""
    steps = [
        Step(f"{name}{i}", stage, f"{name}{i}", None, {"root": "g"}, Layout(*workers, threads=threads, gpus=gpus), {})
        for name, (stage, count, threads, gpus, *workers) in wanted.items()
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


def test_a_gang_that_no_longer_fits_the_cluster_stops_nothing_else(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "require_fits", lambda *_: None)  # a node is gone since
        found = running(tmp_path, {"a": Size(2, 0)}, wide=("update", 1, 1, 0, 4), score=("evaluate", 4, 1, 0))
    assert found == ["score0", "score1"]


def test_a_run_waits_for_a_node_before_it_ends(tmp_path, monkeypatch):
    lines, driver = [], Runner(Plan("x", {}, (), {}), Store(tmp_path).create(), Budget({}), Progress(0, quiet=True))
    monkeypatch.setattr(driver.progress, "line", lines.append)
    monkeypatch.setattr(runner, "nodes", lambda: {"back": Size(1, 0)})
    monkeypatch.setattr(driver, "_dispatch", lambda: driver.running.update(x=None) if driver.budget.nodes else None)
    driver._await_node()
    assert driver.running and "waiting 60 s" in lines[0]
    driver.running.clear()
    monkeypatch.setattr(runner, "AWAIT_S", 0.0)
    monkeypatch.setattr(runner, "nodes", dict)
    with pytest.raises(EngineError, match="no node is left"):
        driver._await_node()


def error_of(cause):
    error = RuntimeError("training failed")
    error.worker_failures = {0: cause}
    return error


@pytest.mark.parametrize(
    ("cause", "kind"),
    [
        (RuntimeError("[../third_party/gloo/pair.cc:1] Connection closed by peer [10.0.0.2]:1"), WorkerDied),
        (RuntimeError("NCCL communicator was aborted on rank 1"), WorkerDied),
        (RuntimeError("NCCL error: CUDA out of memory, connection reset by peer"), RuntimeError),
        (StageError("the loss is not finite; Connection closed by peer"), StageError),
        (ValueError("shapes"), ValueError),
    ],
)
def test_a_rank_that_lost_another_says_nothing_about_the_step(cause, kind):
    assert type(_cause(error_of(cause))) is kind


def test_a_failed_attempt_leaves_no_memory_held(tmp_path):
    held = []

    def work(attempt, log):
        engine = SimpleNamespace(weights=np.zeros(1000))
        engine.itself = engine
        held.append(weakref.ref(engine.weights))
        raise RuntimeError("out of memory")

    step = Step("0" * 64, "finetune", "x", None, {}, Layout(), {})
    gc.disable()
    try:
        assert not attempted(Job(step, {}, Store(tmp_path).create().root), work).ok
        assert held[0]() is None
    finally:
        gc.enable()


def test_a_word_to_stop_is_seen_by_its_directory(tmp_path):
    assert not listed(tmp_path / "none" / "stop") and not listed(tmp_path / "stop")
    (tmp_path / "stop").touch()
    assert listed(tmp_path / "stop")


def test_a_size_that_no_node_has_keeps_no_place(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "require_fits", lambda *_: None)  # the node that it fitted is gone since
        found = running(tmp_path, {"a": Size(4, 0)}, train=("finetune", 1, 8, 0), score=("evaluate", 4, 1, 0))
    assert found == ["score0", "score1", "score2"]
