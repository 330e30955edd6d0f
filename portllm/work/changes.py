"""What patches do to a model's stored tensors, from headers and configurations alone: no tensor is read, torch is not
needed, and nothing has been written when a patch turns out not to fit."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from portllm.errors import ResolveError, SpecError
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


Method = Literal["ties", "dare", "dare-ties"]


@dataclass(frozen=True)
class Blend:
    """How several patches become one, where they are not just summed (`work/blending.py`)."""

    method: Method
    density: float = 0.2
    """Share of each ΔW that stays, above 0 and at most 1."""
    seed: int = 0
    """Of DARE's draws."""

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise SpecError(f"density: {self.density:g} is no share; give one above 0 and at most 1")


@dataclass(frozen=True)
class Blended:
    """The deltas of one module, blended and added as one."""

    parts: tuple[Delta, ...]
    how: Blend

    @property
    def parameter(self) -> str:
        """Name in the model."""
        return self.parts[0].parameter


@dataclass(frozen=True)
class Rounding:
    """A version's own rounding, between the deltas that make it and the patches added to it."""

    parameter: str
    dtype: str
    """Safetensors' name."""


Change = Delta | Replacement | Blended | Rounding


def read_patches(
    patches: Patches, tensors: Mapping[str, TensorEntry], tied: bool, blend: Blend | None = None
) -> list[Applied]:
    """The patches' adapters, all of them checked against the model's tensors before any is added.

    Raises `ResolveError` for one that does more than add where it has a λ, stands beside others or is blended.
    """
    applied = [(read_adapter(directory), scale) for directory, scale in patches]
    for adapter, scale in applied:
        require_fits(adapter, tensors, tied)
        if adapter.beyond_deltas and (scale != 1.0 or len(applied) > 1):
            why = f"λ = {scale:g}" if scale != 1.0 else "other patches"
            raise ResolveError(
                f"{adapter.directory}: {adapter.beyond_deltas}: that is no sum of deltas; apply it alone, without {why}"
            )
        if blend:
            require_plain(adapter)
    return applied


def require_plain(adapter: Adapter) -> None:
    """Raises `ResolveError` for an adapter that is more than the ΔW of its modules."""
    biased = next((f"adds to the bias of `{name}`" for name, target in adapter.targets.items() if target.bias), None)
    if beyond := adapter.beyond_deltas or biased:
        raise ResolveError(f"{adapter.directory}: {beyond}: only patches of plain deltas are combined")


def touched(
    applied: Iterable[Applied], tensors: Mapping[str, TensorEntry], blend: Blend | None = None
) -> dict[str, list[Change]]:
    """The stored tensors the patches change, by name, each with its changes in the order they are made."""
    changes: dict[str, list[Change]] = {}
    for adapter, scale in applied:
        for change in _changes(adapter, scale):
            name = stored_name(change.parameter, tensors)
            assert name is not None, "read_patches checked that everything fits"
            changes.setdefault(name, []).append(change)
    return changes if blend is None else {name: [_blended(found, blend)] for name, found in changes.items()}


def _blended(changes: Sequence[Change], blend: Blend) -> Blended:
    return Blended(tuple(change for change in changes if isinstance(change, Delta)), blend)


def _changes(adapter: Adapter, scale: float) -> Iterator[Delta | Replacement]:
    for name, entry in adapter.replaced.items():
        yield Replacement(entry, name)
    for module, target in adapter.targets.items():
        yield Delta(adapter, module, scale)
        if target.bias:
            yield Delta(adapter, module, scale, "bias")
