"""Which step a worker takes next. Pure state over a plan: no Ray, no clock.

Order of work: whatever others wait for (base, corpus, requests, update), then patches, then scores. A version's cells
are started only when all of them are ready, and a worker that opened a version for evaluation stays with it until they
are scored: model loads for evaluation are at most versions × evaluators, never cells.
"""

from collections import defaultdict
from collections.abc import Iterable

from portllm.engine.pool import Budget, Size
from portllm.errors import SpecError
from portllm.study.steps import Plan, Step

VersionId = tuple[str, ...]
_FIRST = {"base": 0, "update": 1, "corpus": 2, "requests": 3}


def size_of(step: Step) -> Size:
    """What one worker of a step holds."""
    return Size(step.layout.threads, step.layout.gpus)


def require_fits(step: Step, budget: Budget) -> None:
    """Raises SpecError for a step that the empty cluster could not hold."""
    if not budget.can_ever([size_of(step)] * step.layout.workers):
        held = ", ".join(f"{n.cpus} CPUs and {n.gpus} GPUs" for n in budget.nodes.values())
        raise SpecError(
            f"{step.label} asks for {step.layout.workers} x ({step.layout.threads} CPUs, {step.layout.gpus} GPUs), and "
            f"there are nodes of {held}: lower resources.{step.stage} or join a larger cluster (--address)"
        )


class Schedule:
    """Steps of a plan by state: published, waiting, ready, running, failed, blocked."""

    def __init__(self, plan: Plan, published: Iterable[str]) -> None:
        self.plan = plan
        self.published = set(published) & plan.steps.keys()
        self.running: set[str] = set()
        self.failed: set[str] = set()
        self.blocked: set[str] = set()
        self.dependents = plan.dependents()
        self.missing = {key: self._missing(step) for key, step in plan.steps.items() if key not in self.published}
        self.ready: dict[str, Step] = {}
        self.cells: dict[VersionId, dict[str, Step]] = defaultdict(dict)
        """Ready evaluations by version."""
        self.unsettled: dict[VersionId, int] = defaultdict(int)
        """Evaluations of a version that still wait for an input."""
        for key, count in self.missing.items():
            step = plan.steps[key]
            if count == 0:
                self._make_ready(step)
            elif step.stage == "evaluate":
                self.unsettled[_version(step)] += 1

    def _missing(self, step: Step) -> int:
        return sum(key in self.plan.steps and key not in self.published for key in set(step.inputs.values()))

    def _make_ready(self, step: Step) -> None:
        if step.stage == "evaluate":
            self.cells[_version(step)][step.key] = step
        else:
            self.ready[step.key] = step

    @property
    def finished(self) -> bool:
        """Nothing runs and nothing can."""
        return not self.running and not self.ready and not any(self.cells.values())

    @property
    def waiting(self) -> int:
        """Steps that wait for an input."""
        return sum(1 for key, count in self.missing.items() if count and key not in self.blocked)

    @property
    def startable(self) -> int:
        """Steps that could start now."""
        return len(self.ready) + sum(map(len, self.cells.values()))

    # --- what happened

    def start(self, step: Step) -> None:
        """A step was given to a worker."""
        self.ready.pop(step.key, None)
        if step.stage == "evaluate":
            self.cells[_version(step)].pop(step.key, None)
        self.running.add(step.key)

    def retry(self, step: Step) -> None:
        """A step goes back to the ready ones (its layout may have changed)."""
        self.running.discard(step.key)
        self._make_ready(step)

    def publish(self, key: str) -> None:
        """A step exists; what waited for it alone is ready."""
        self.running.discard(key)
        self.missing.pop(key, None)
        self.published.add(key)
        for dependent in self.dependents[key]:
            if dependent in self.missing and dependent not in self.blocked:
                self.missing[dependent] -= 1
                if self.missing[dependent] == 0:
                    self._settle(dependent)
                    self._make_ready(self.plan.steps[dependent])

    def fail(self, key: str) -> list[str]:
        """A step is given up; everything that needs it is blocked. Returns the newly blocked keys."""
        self.running.discard(key)
        self.failed.add(key)
        newly, stack = [], list(self.dependents[key])
        while stack:
            dependent = stack.pop()
            if dependent not in self.blocked and dependent in self.missing:
                self.blocked.add(dependent)
                self._settle(dependent)
                newly.append(dependent)
                stack.extend(self.dependents[dependent])
        return newly

    def _settle(self, key: str) -> None:
        step = self.plan.steps[key]
        if step.stage == "evaluate":
            self.unsettled[_version(step)] -= 1

    # --- what comes next

    def gangs(self) -> list[Step]:
        """Ready steps that need several ranks."""
        return [step for step in self.ready.values() if step.layout.workers > 1]

    def pick(self, size: Size, resident: VersionId | None, served: set[VersionId]) -> Step | None:
        """The next step for a worker whose open version is `resident`; `served`: versions others score now."""
        if resident is not None and (step := self._cell(resident, size)):
            return step
        singles = [s for s in self.ready.values() if s.layout.workers == 1 and size_of(s) == size]
        if singles:
            return min(singles, key=lambda s: _urgency(s, resident))
        return self._new_group(size, served)

    def sizes_wanted(self) -> dict[Size, int]:
        """How many steps could start now, by worker size."""
        wanted: dict[Size, int] = defaultdict(int)
        for step in self.ready.values():
            if step.layout.workers == 1:
                wanted[size_of(step)] += 1
        for version, cells in self.cells.items():
            if cells and not self.unsettled[version]:
                wanted[size_of(next(iter(cells.values())))] += max(1, len(cells) // 2)
        return wanted

    def _cell(self, version: VersionId, size: Size) -> Step | None:
        if self.unsettled[version]:
            return None
        return next((s for s in self.cells[version].values() if size_of(s) == size), None)

    def _new_group(self, size: Size, served: set[VersionId]) -> Step | None:
        """A version nobody scores; else a hand with one that has at least two cells left."""
        settled = [v for v, cells in self.cells.items() if cells and self._cell(v, size)]
        fresh = [v for v in settled if v not in served]
        shared = [v for v in settled if v in served and len(self.cells[v]) >= 2]
        chosen = fresh[0] if fresh else max(shared, key=lambda v: len(self.cells[v]), default=None)
        return self._cell(chosen, size) if chosen is not None else None


def _version(step: Step) -> VersionId:
    assert step.version is not None
    return step.version


def _urgency(step: Step, resident: VersionId | None) -> tuple[int, int]:
    return _FIRST.get(step.stage, 4), 0 if step.version == resident else 1
