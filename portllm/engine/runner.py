"""Runs a plan on Ray: skip what is published, start what is ready, publish, mirror, go on past failures.

The driver is one loop: `_dispatch` hands steps to idle workers (starting and retiring workers within the budget),
`_collect` waits for one of them to end. It holds no results; everything it knows can be read from the store again.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray

from portllm.engine.cluster import nodes
from portllm.engine.execute import Outcome, job_for
from portllm.engine.failures import DIED, PREEMPTED, Decision, Failure, decide
from portllm.engine.gang import run_gang
from portllm.engine.pool import Budget, Size
from portllm.engine.progress import Progress
from portllm.engine.schedule import Schedule, VersionId, require_fits, size_of
from portllm.engine.watch import Line, Watch
from portllm.engine.workers import start_worker
from portllm.errors import EngineError
from portllm.store.store import Store
from portllm.study.steps import TRAININGS, Plan, Step

AWAIT_S = 60.0
"""How long a run waits for a node where none is left that could run anything."""


@dataclass
class Report:
    """What a run did."""

    executed: list[str] = field(default_factory=list)
    """Labels of the steps executed and published."""
    failed: dict[str, Failure] = field(default_factory=dict)
    """By key."""
    blocked: list[str] = field(default_factory=list)
    evaluation_loads: int = 0
    """Times an evaluation loaded a model's weights."""
    training_loads: int = 0
    process_starts: int = 0
    """Worker processes and ranks started."""
    evaluators: int = 0
    """Workers that scored at least one cell."""
    versions: int = 0
    """Versions scored."""
    wall_s: float = 0.0


@dataclass(eq=False)
class Slot:
    """A live worker as the driver sees it."""

    actor: Any
    node: str
    size: Size
    number: int
    resident: VersionId | None = None
    step: Step | None = None
    """What it executes now."""


@dataclass(eq=False)
class Gang:
    """A running training over several ranks."""

    step: Step
    nodes: list[str]


@dataclass
class Runner:
    """One run of one plan."""

    plan: Plan
    store: Store
    budget: Budget
    progress: Progress
    published: Callable[[Step], None] = lambda step: None
    """Called after each publication; must not block."""
    watched: Callable[[Step, list[Line]], None] = lambda step, lines: None
    """Called with what running steps say of themselves; must not block."""
    schedule: Schedule = field(init=False)
    slots: list[Slot] = field(default_factory=list)
    running: dict[Any, Slot | Gang] = field(default_factory=dict)
    """Ray reference of an execution to who does it."""
    watches: dict[str, Watch] = field(default_factory=dict)
    """Of the running steps, by key."""
    history: dict[str, list[Failure]] = field(default_factory=dict)
    report: Report = field(default_factory=Report)
    scored: set[tuple[int, VersionId]] = field(default_factory=set)
    before: int = 0

    def __post_init__(self) -> None:
        stages = [step.stage for step in self.plan.steps.values()]
        self.schedule = Schedule(self.plan, self.store.published(stages))
        self.before = len(self.schedule.published)
        for step in self.plan.steps.values():
            if step.key not in self.schedule.published:
                require_fits(step, self.budget)

    def run(self) -> Report:
        """Run until nothing can go on."""
        while not self.schedule.finished:
            self._dispatch()
            self.progress.show(self.schedule, self.before, self.watches)
            self._collect()
        self._retire_all()
        self.report.blocked = [self.plan.steps[k].label for k in sorted(self.schedule.blocked)]
        self.report.evaluators = len({number for number, _ in self.scored})
        self.report.versions = len({version for _, version in self.scored})
        return self.report

    def stop(self, seconds: float) -> None:
        """Tells the running trainings to keep their state, and waits until they have, so long at most."""
        steps = {reference: holder.step for reference, holder in self.running.items()}
        trainings = {ref: step.key for ref, step in steps.items() if step and step.stage in TRAININGS}
        for stop in map(self.store.paths.stop, trainings.values()):
            with contextlib.suppress(OSError):
                stop.parent.mkdir(parents=True, exist_ok=True)
                stop.touch()
        if trainings:
            ray.wait(list(trainings), num_returns=len(trainings), timeout=seconds)

    # --- dispatch

    def _dispatch(self) -> None:
        gangs = [step for step in self.schedule.gangs() if self.budget.can_ever(_ranks(step))]
        if gangs:
            self._start_gang(gangs[0])
            return  # nothing starts in its place: idle workers are retired until it fits
        for slot in self.slots:
            if slot.step is None:
                self._feed(slot)
        while worker := self._next_worker():
            self._feed(self._start(*worker))

    def _feed(self, slot: Slot) -> None:
        served = {s.step.version for s in self.slots if s.step and s.step.stage == "evaluate" and s.step.version}
        step = self.schedule.pick(slot.size, slot.resident, served)
        if step is None:
            return
        self._begin(step)
        slot.step = step
        slot.resident = step.version or slot.resident
        job = job_for(step, self.plan, self.store)
        self.running[slot.actor.run.options(name=step.label).remote(job)] = slot  # Ray's own events bear the label

    def _begin(self, step: Step) -> None:
        self.schedule.start(step)
        self.watches[step.key] = Watch(self.store.paths.watch(step.key))

    def _next_worker(self) -> tuple[str, Size] | None:
        """A node and a size that is wanted. One that finds no room keeps what it lacks from those behind it.

        So trainings that wait for a GPU leave CPUs to evaluations, and none that waits for CPUs is overtaken for ever.
        """
        kept: dict[str, Size] = {}
        for size in self._wanted_sizes():
            if node := self._make_room(size, kept):
                return node, size
            kept |= self._lacking(size)
        return None

    def _wanted_sizes(self) -> list[Size]:
        """Sizes of workers that more ready steps ask for than idle workers of that size could take."""
        idle = [s.size for s in self.slots if s.step is None]
        return [size for size, count in self.schedule.sizes_wanted().items() if count > idle.count(size)]

    def _lacking(self, size: Size) -> dict[str, Size]:
        """The node where a worker that finds no room will find it, and what of its size is short there."""
        able = [node for node, whole in self.budget.nodes.items() if size.fits(whole)]
        if not able:
            return {}
        node = max(able, key=lambda node: (self.budget.free(node).gpus, self.budget.free(node).cpus))
        free = self.budget.free(node)
        return {node: Size(size.cpus if size.cpus > free.cpus else 0, size.gpus if size.gpus > free.gpus else 0)}

    def _make_room(self, size: Size, kept: Mapping[str, Size]) -> str | None:
        """A node with room for a worker beside what is kept, retiring idle ones of other sizes if that helps."""
        less = {node: Size(0, 0) - part for node, part in kept.items()}
        if nodes := self.budget.place([size], less):
            return nodes[0]
        idle = [s for s in self.slots if s.step is None and s.size != size]
        back = _by_node(idle)
        if not self.budget.place([size], back | {n: back.get(n, Size(0, 0)) + part for n, part in less.items()}):
            return None
        while not (nodes := self.budget.place([size], less)):
            self._retire(idle.pop())
        return nodes[0]

    def _start(self, node: str, size: Size) -> Slot:
        self.budget.hold(node, size)
        self.report.process_starts += 1
        slot = Slot(start_worker(node, size, self.scratch), node, size, self.report.process_starts)
        self.slots.append(slot)
        return slot

    def _retire(self, slot: Slot) -> Any:
        """End an idle worker; its capacity counts as free from here on, Ray gives it out once the process is gone."""
        self.slots.remove(slot)
        self.budget.release(slot.node, slot.size)
        return slot.actor.end.remote()

    def _retire_all(self) -> None:
        with contextlib.suppress(ray.exceptions.RayError):
            ends = [self._retire(slot) for slot in list(self.slots)]
            if ends:
                ray.wait(ends, num_returns=len(ends), timeout=5)

    def _start_gang(self, step: Step) -> None:
        ranks = _ranks(step)
        idle = [s for s in self.slots if s.step is None]
        while not (nodes := self.budget.place(ranks)):
            if not idle:
                return  # busy workers end first
            self._retire(idle.pop())
        for node, rank in zip(nodes, ranks, strict=True):
            self.budget.hold(node, rank)
        self._begin(step)
        self.report.process_starts += step.layout.workers
        job = job_for(step, self.plan, self.store)
        reference = run_gang.options(name=step.label).remote(job, nodes, str(self.scratch))
        self.running[reference] = Gang(step, nodes)

    @property
    def scratch(self) -> Path:
        """Node-local cache of versions."""
        return Path(os.environ.get("PORTLLM_SCRATCH") or self.store.paths.scratch)

    # --- collect

    def _collect(self) -> None:
        if not self.running:
            self._await_node()
        ended, _ = ray.wait(list(self.running), num_returns=1, timeout=0.5)
        self._watch()
        for reference in ended:
            holder = self.running.pop(reference)
            step = holder.step
            assert step is not None
            del self.watches[step.key]
            outcome = self._outcome(reference, holder, step)
            self._release(holder, outcome)
            if not outcome.pid or (outcome.failure and outcome.failure.type in (DIED, PREEMPTED)):
                self._look_again()
            self._account(step, holder, outcome)

    def _await_node(self) -> None:
        """Nothing runs and nothing can start: a lost node may come back, or another in its place."""
        self.progress.line(f"no node is left that could run a step; waiting {AWAIT_S:g} s for one")
        deadline = time.monotonic() + AWAIT_S
        while not self.running:
            if time.monotonic() > deadline:
                raise EngineError(f"{self.schedule.startable} steps are ready and no node is left that could run one")
            time.sleep(1)
            self._look_again()
            self._dispatch()

    def _watch(self) -> None:
        for key, watch in self.watches.items():
            if lines := watch.news():
                self.watched(self.plan.steps[key], lines)

    def _outcome(self, reference: Any, holder: Slot | Gang, step: Step) -> Outcome:
        try:
            return ray.get(reference)
        except ray.exceptions.RayError as error:
            memory = isinstance(error, ray.exceptions.OutOfMemoryError)
            text = str(error).splitlines()[0]
            failure = Failure(
                "OutOfMemoryError" if memory else DIED,
                f"the process that executed it died: {text}",
                str(error)[-2000:],
                str(self.store.root / "logs"),
            )
            return Outcome(step.key, False, 0.0, failure=failure)

    def _release(self, holder: Slot | Gang, outcome: Outcome) -> None:
        if isinstance(holder, Gang):
            for node in holder.nodes:
                self.budget.release(node, size_of(holder.step))
            return
        holder.step = None
        failure = outcome.failure
        # It was told to end, or its GPU would answer no later step, or nobody was left to sign the outcome.
        if not outcome.pid or (failure and (failure.type == PREEMPTED or failure.lost_device)):
            self._retire(holder)

    def _look_again(self) -> None:
        """After a process died: its node may be gone, with the idle workers on it, and others may have joined."""
        self.budget.nodes = nodes()
        for slot in [s for s in self.slots if s.step is None and s.node not in self.budget.nodes]:
            self._retire(slot)

    def _account(self, step: Step, holder: Slot | Gang, outcome: Outcome) -> None:
        if step.stage == "evaluate":
            self.report.evaluation_loads += outcome.loads
        else:
            self.report.training_loads += outcome.loads
        if outcome.ok:
            if step.stage == "evaluate" and isinstance(holder, Slot) and step.version:
                self.scored.add((holder.number, step.version))
            self._publish(step, outcome)
        else:
            self._fail(step, outcome)

    def _publish(self, step: Step, outcome: Outcome) -> None:
        self.schedule.publish(step.key)
        self.report.executed.append(step.label)
        self.published(step)
        self.progress.done(step, outcome.wall_s, outcome.summary, self.schedule)

    def _fail(self, step: Step, outcome: Outcome) -> None:
        failure = outcome.failure
        assert failure is not None
        history = self.history.setdefault(step.key, [])
        history.append(failure)
        decision = decide(history)
        with contextlib.suppress(OSError):  # a full disk must not end the run
            self.store.fail(step.key, {"label": step.label, "decision": decision.value, **vars(failure)})
        self.progress.line(f"{step.label}: {failure.type}: {failure.message} ({decision.value}); log: {failure.log}")
        if decision is Decision.GIVE_UP:
            self.report.failed[step.key] = failure
            self.schedule.fail(step.key)
        else:
            self.schedule.retry(smaller(step) if decision is Decision.SMALLER else step)


def _ranks(step: Step) -> list[Size]:
    return [size_of(step)] * step.layout.workers


def smaller(step: Step) -> Step:
    """The same step, the same key, with half the tokens in a forward pass and twice as many passes."""
    return replace(step, layout=replace(step.layout, micro_tokens=max(1, step.layout.budget // 2)))


def _by_node(slots: list[Slot]) -> dict[str, Size]:
    result: dict[str, Size] = {}
    for slot in slots:
        result[slot.node] = result.get(slot.node, Size(0, 0)) + slot.size
    return result
