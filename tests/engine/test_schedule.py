"""Which step comes next, and the budget of the cluster: no Ray, no clock."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portllm.engine.failures import ATTEMPTS, DIED, Decision, Failure, decide
from portllm.engine.pool import Budget, Size
from portllm.engine.schedule import Schedule
from tests.study.worlds import plan

ONE = Size(1, 0)


def drain(schedule, workers, fail=()):
    """Run the schedule with workers that take turns; returns (worker, step) in order of start."""
    resident, busy, order = dict.fromkeys(range(workers)), {}, []
    while not schedule.finished:
        for worker in range(workers):
            if worker in busy:
                step = busy.pop(worker)
                schedule.fail(step.key) if step.label in fail else schedule.publish(step.key)
            served = {s.version for s in busy.values() if s.stage == "evaluate"}
            step = schedule.pick(ONE, resident[worker], served)
            if step is not None:
                schedule.start(step)
                busy[worker], resident[worker] = step, step.version or resident[worker]
                order.append((worker, step))
    return order


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_every_step_runs_once_and_after_its_inputs(workers):
    found = plan()
    order = drain(Schedule(found, ()), workers)
    assert sorted(s.key for _, s in order) == sorted(found.steps)
    seen = set(found.givens)
    for _, step in order:
        assert set(step.inputs.values()) <= seen | {s.key for _, s in order}
        seen.add(step.key)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_model_loads_for_evaluation_are_at_most_versions_times_evaluators(workers):
    order = drain(Schedule(plan(), ()), workers)
    loads, open_version = 0, {}
    for worker, step in order:
        if step.version is None:
            continue
        if step.stage == "evaluate" and open_version.get(worker) != step.version:
            loads += 1
        open_version[worker] = step.version
    versions = {s.version for _, s in order if s.stage == "evaluate"}
    evaluators = {w for w, s in order if s.stage == "evaluate"}
    assert loads <= len(versions) * len(evaluators)
    assert workers > 1 or loads <= len(versions)


def test_a_failed_step_blocks_its_dependents_and_nothing_else():
    found = plan()
    schedule = Schedule(found, ())
    drain(schedule, 2, fail={"update soft t=1"})
    dead = {found.steps[k].label for k in schedule.blocked}
    assert all("soft t=1" in label or "soft t=2" in label for label in dead)
    assert not any("hard t=" in label or "m t=0" in label for label in dead)
    assert schedule.published | schedule.blocked | schedule.failed == found.steps.keys()


def test_published_steps_are_not_started_again():
    found = plan()
    assert drain(Schedule(found, found.steps), 2) == []
    done = {k for k, s in found.steps.items() if s.stage != "evaluate"}
    assert {s.stage for _, s in drain(Schedule(found, done), 2)} == {"evaluate"}


def test_updates_come_before_patches():
    order = [s.stage for _, s in drain(Schedule(plan(), ()), 1)]
    assert max(i for i, s in enumerate(order) if s == "update") < min(i for i, s in enumerate(order) if s == "finetune")


def test_gangs_are_not_given_to_workers():
    schedule = Schedule(plan("resources.finetune.workers=2"), ())
    drained = drain_until_stuck(schedule)
    assert drained and {s.stage for s in schedule.gangs()} == {"finetune"}


def drain_until_stuck(schedule):
    steps = []
    while step := schedule.pick(ONE, None, set()):
        schedule.start(step)
        schedule.publish(step.key)
        steps.append(step)
    return steps


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 2)), max_size=6))
def test_a_placement_never_exceeds_a_node(sizes):
    budget = Budget({"a": Size(4, 2), "b": Size(2, 0)})
    sizes = [Size(c, g) for c, g in sizes]
    nodes = budget.place(sizes)
    if nodes is not None:
        for node, size in zip(nodes, sizes, strict=True):
            budget.hold(node, size)
        for node in budget.nodes:
            assert budget.free(node).cpus >= 0 and budget.free(node).gpus >= 0


def test_a_gang_spans_nodes_and_counts_what_idle_workers_would_return():
    budget = Budget({"a": Size(2, 2), "b": Size(2, 2)})
    assert budget.place([Size(1, 1)] * 4) == ["a", "a", "b", "b"]
    budget.hold("a", Size(2, 2))
    assert budget.place([Size(1, 1)] * 4) is None
    assert budget.place([Size(1, 1)] * 4, {"a": Size(2, 2)}) is not None
    assert not budget.can_ever([Size(1, 1)] * 5) and not budget.can_ever([Size(3, 0)])


@pytest.mark.parametrize(
    "history, decision",
    [
        ([(DIED, "")], Decision.RETRY),
        ([(DIED, "")] * 2, Decision.SMALLER),
        ([(DIED, "")] * ATTEMPTS, Decision.GIVE_UP),
        ([("OutOfMemoryError", "CUDA out of memory")], Decision.SMALLER),
        (
            [("RuntimeError", "[enforce fail at alloc_cpu.cpp] . DefaultCPUAllocator: can't allocate memory")],
            Decision.SMALLER,
        ),
        ([("MemoryError", "")], Decision.SMALLER),
        ([("RuntimeError", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`")], Decision.SMALLER),
        ([("AcceleratorError", "CUDA error: device-side assert triggered")], Decision.RETRY),
        ([("RuntimeError", "CUDA error: uncorrectable ECC error encountered")] * ATTEMPTS, Decision.GIVE_UP),
        ([("StageError", "the loss is not finite")], Decision.GIVE_UP),
        ([("OSError", "[Errno 28] No space left on device")], Decision.GIVE_UP),
    ],
)
def test_decisions_follow_the_last_failure(history, decision):
    assert decide([Failure(t, m) for t, m in history]) is decision
