"""The budget of CPUs and GPUs, node by node, and who holds what. Pure: no Ray in here.

The engine, not Ray, decides where a worker starts: Ray queues an actor that does not fit for ever, so a gang beside
idle workers would wait for them while they wait for work (measured: two idle one-CPU actors and a two-rank trainer on
two CPUs were still waiting after 50 s).
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Size:
    """What one worker, or one rank of a gang, holds."""

    cpus: int
    gpus: int

    def fits(self, free: "Size") -> bool:
        """Whether it fits into what is free; what it does not need may be kept for others beyond that."""
        return all(need <= left for need, left in ((self.cpus, free.cpus), (self.gpus, free.gpus)) if need)

    def __add__(self, other: "Size") -> "Size":
        return Size(self.cpus + other.cpus, self.gpus + other.gpus)

    def __sub__(self, other: "Size") -> "Size":
        return Size(self.cpus - other.cpus, self.gpus - other.gpus)


@dataclass
class Budget:
    """Free capacity of every node."""

    nodes: Mapping[str, Size]
    """Node id to its whole capacity."""
    held: dict[str, Size] = field(default_factory=dict)

    @classmethod
    def of_this_machine(cls) -> "Budget":
        """What a local Ray would have; kinds of GPU whose number cannot be counted here never refuse anything."""
        gpus = len(list(Path("/dev").glob("nvidia[0-9]*"))) or (2**20 if Path("/dev/kfd").exists() else 0)
        return cls({"this machine": Size(len(os.sched_getaffinity(0)), gpus)})

    def free(self, node: str) -> Size:
        """What is free on a node."""
        return self.nodes[node] - self.held.get(node, Size(0, 0))

    def place(self, sizes: Iterable[Size], returned: Mapping[str, Size] | None = None) -> list[str] | None:
        """A node for each of the sizes, or None; `returned` is capacity that would be given back first.

        Nodes are filled one after the other, so that a gang spans as few as it can.
        """
        free = {n: self.free(n) + (returned or {}).get(n, Size(0, 0)) for n in self.nodes}
        chosen = []
        for size in sizes:
            node = next((n for n, f in free.items() if size.fits(f)), None)
            if node is None:
                return None
            free[node] -= size
            chosen.append(node)
        return chosen

    def hold(self, node: str, size: Size) -> None:
        """Take capacity of a node."""
        self.held[node] = self.held.get(node, Size(0, 0)) + size

    def release(self, node: str, size: Size) -> None:
        """Give capacity back."""
        self.held[node] = self.held[node] - size

    def can_ever(self, sizes: Iterable[Size]) -> bool:
        """Whether the sizes fit the empty cluster."""
        return Budget(self.nodes).place(list(sizes)) is not None
