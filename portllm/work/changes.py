"""What patches do to a model's stored tensors, from headers and configurations alone: no tensor is read, torch is not
needed, and nothing has been written when a patch turns out not to fit."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from portllm.formats.adapter import Adapter, read_adapter, require_fits, weight_name
from portllm.formats.tensors import TensorEntry

Patches = Sequence[tuple[Path, float]]
"""Patch directories in the order they are added, each with its λ."""
Applied = tuple[Adapter, float]
"""An adapter and its λ."""
Change = tuple[Applied, str]
"""A patch, and the module whose delta it adds."""


def read_patches(patches: Patches, tensors: Mapping[str, TensorEntry], tied: bool) -> list[Applied]:
    """The patches' adapters, all of them checked against the model's tensors before any is added."""
    applied = [(read_adapter(directory), scale) for directory, scale in patches]
    for adapter, _ in applied:
        require_fits(adapter, tensors, tied)
    return applied


def touched(applied: Iterable[Applied], tensors: Mapping[str, TensorEntry]) -> dict[str, list[Change]]:
    """The stored tensors the patches change, by name, each with its changes in the order they are added."""
    changes: dict[str, list[Change]] = {}
    for patch in applied:
        for module in patch[0].targets:
            name = weight_name(module, tensors)
            assert name is not None, "read_patches checked that every target fits"
            changes.setdefault(name, []).append((patch, module))
    return changes
