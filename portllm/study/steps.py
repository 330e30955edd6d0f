"""What a plan is made of: steps, versions, cells. Frozen values."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from portllm.study.facts import Given, ModelFacts
from portllm.study.keys import payload
from portllm.study.resources import Layout

TRAININGS = frozenset({"base", "update", "finetune"})
"""Stages that train: they have a curve, a ledger and checkpoints."""


@dataclass(frozen=True)
class Cost:
    """Of one step, or of many."""

    device_s: float = 0.0
    """Device seconds: wall times devices (`Layout.devices`)."""
    memory: int = 0
    """Bytes of one worker."""
    disk: int = 0
    """Bytes published."""

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.device_s + other.device_s, max(self.memory, other.memory), self.disk + other.disk)


@dataclass(frozen=True)
class Step:
    """A unit of planned work."""

    key: str
    stage: str
    label: str
    recipe: Any
    inputs: Mapping[str, str]
    """Role to key, of another step or of something given."""
    layout: Layout = field(default_factory=Layout)
    coordinates: Mapping[str, Any] = field(default_factory=dict)
    """Where the study first asked for it: names only."""
    cost: Cost = Cost()
    """What it is expected to cost."""

    def payload(self) -> dict[str, Any]:
        """What the key is the hash of."""
        return payload(self.stage, self.recipe, self.inputs)

    @property
    def version(self) -> tuple[str, ...] | None:
        """Identity of the version this step opens: keys of root and deltas."""
        roles = [role for role in self.inputs if role == "root" or role.startswith("delta")]
        return tuple(self.inputs[role] for role in sorted(roles, key=_role_order)) if roles else None


def _role_order(role: str) -> int:
    return 0 if role == "root" else int(role.removeprefix("delta"))


@dataclass(frozen=True)
class Version:
    """θₜ in a plan."""

    t: int
    root: str
    deltas: tuple[str, ...] = ()
    tokenizer: str = ""
    update: str | None = None
    """lora, full or given; None at t = 0."""
    facts: ModelFacts | None = None

    @property
    def key(self) -> str:
        """Key of the step or given thing that made this version what it is."""
        return self.deltas[-1] if self.deltas else self.root

    @property
    def trained(self) -> bool:
        """Whether the study trained it: each update seed then has its own. θ₀ and a given version are every seed's."""
        return self.update in ("lora", "full")

    @property
    def inputs(self) -> dict[str, str]:
        """Roles of a step that opens this version."""
        return {"root": self.root} | {f"delta{i}": key for i, key in enumerate(self.deltas, 1)}


@dataclass(frozen=True)
class Cell:
    """One planned coordinate of the result table, and the step that scores it."""

    model: str
    lineage: str
    t: int
    update: str | None
    update_seed: int | None
    task: str
    num_fewshot: int
    arm: str
    source_t: int | None
    rank: int | None
    seed: int | None
    patches: tuple[str, ...]
    apply: str
    dtype: str
    key: str
    version_key: str


@dataclass(frozen=True)
class Diagnosis:
    """One ported patch on one version, and the step that diagnoses it."""

    model: str
    lineage: str
    t: int
    update: str | None
    update_seed: int | None
    """None at a given version, which every update seed shares."""
    task: str
    rank: int | None
    seed: int | None
    key: str


@dataclass(frozen=True)
class Plan:
    """Steps in an order that respects their inputs, cells in the order of the study."""

    name: str
    steps: Mapping[str, Step]
    cells: tuple[Cell, ...]
    givens: Mapping[str, Given]
    diagnoses: tuple[Diagnosis, ...] = ()
    unpinned: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def dependents(self) -> dict[str, list[str]]:
        """Steps that read each step."""
        result: dict[str, list[str]] = {key: [] for key in self.steps}
        for step in self.steps.values():
            for key in set(step.inputs.values()) & self.steps.keys():
                result[key].append(step.key)
        return result
