"""What patches do to a model's stored tensors, from headers and configurations alone: no tensor is read, torch is not
needed, and nothing has been written when a patch turns out not to fit."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from portllm.errors import ResolveError
from portllm.formats.adapter import Adapter, read_adapter, require_fits, stored_name
from portllm.formats.tensors import TensorEntry

Patches = Sequence[tuple[Path, float]]
"""Patch directories in the order they are added, each with its λ."""
Applied = tuple[Adapter, float]
"""An adapter and its λ."""


@dataclass(frozen=True)
class Delta:
    """What a target adds to its layer: λΔW to the weight (and DoRA's lengths), or λ·scale·b_B to the bias."""

    adapter: Adapter
    module: str
    scale: float = 1.0
    """λ."""
    part: Literal["weight", "bias"] = "weight"

    @property
    def parameter(self) -> str:
        """Name in the model."""
        return f"{self.module}.{self.part}"


@dataclass(frozen=True)
class Replacement:
    """A tensor in the place of the model's: a trained bias, a saved module."""

    entry: TensorEntry
    parameter: str


Change = Delta | Replacement


def read_patches(patches: Patches, tensors: Mapping[str, TensorEntry], tied: bool) -> list[Applied]:
    """The patches' adapters, all of them checked against the model's tensors before any is added.

    Raises `ResolveError` for one that does more than add where it has a λ or stands beside others.
    """
    applied = [(read_adapter(directory), scale) for directory, scale in patches]
    for adapter, scale in applied:
        require_fits(adapter, tensors, tied)
        if adapter.beyond_deltas and (scale != 1.0 or len(applied) > 1):
            why = f"λ = {scale:g}" if scale != 1.0 else "other patches"
            raise ResolveError(
                f"{adapter.directory}: {adapter.beyond_deltas}: that is no sum of deltas; apply it alone, without {why}"
            )
    return applied


def touched(applied: Iterable[Applied], tensors: Mapping[str, TensorEntry]) -> dict[str, list[Change]]:
    """The stored tensors the patches change, by name, each with its changes in the order they are made."""
    changes: dict[str, list[Change]] = {}
    for adapter, scale in applied:
        for change in _changes(adapter, scale):
            name = stored_name(change.parameter, tensors)
            assert name is not None, "read_patches checked that everything fits"
            changes.setdefault(name, []).append(change)
    return changes


def _changes(adapter: Adapter, scale: float) -> Iterator[Change]:
    for name, entry in adapter.replaced.items():
        yield Replacement(entry, name)
    for module, target in adapter.targets.items():
        yield Delta(adapter, module, scale)
        if target.bias:
            yield Delta(adapter, module, scale, "bias")
