"""A model directory and what is added to it, every name and shape checked; no tensor is read before it is asked for.

    stored tensor = round(round(W + Σ deltas) + Σ λ patches)

The inner rounding is the version's own (a version kept as root + deltas); without deltas it is nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portllm.errors import ResolveError
from portllm.formats.adapter import EMBEDDINGS, Adapter, last_part, ties_embeddings
from portllm.formats.tensors import TensorEntry, model_tensors, read_json
from portllm.work.changes import Applied, Blend, Change, Patches, Rounding, read_patches, touched

if TYPE_CHECKING:
    import torch

_HEADS = {"biogpt": "output_projection.weight"}


def head_name(config: Mapping[str, Any]) -> str:
    """transformers' name of a head that can be tied."""
    return _HEADS.get(str(config.get("model_type")), "lm_head.weight")


@dataclass(frozen=True)
class Terms:
    """What else enters the sum."""

    deltas: Sequence[Path] = ()
    """LoRA updates that make the version out of the model directory, in order; it is rounded before the patches."""
    blend: Blend | None = None
    """How the patches become one delta; None adds them one by one."""
    untie: bool = False
    """The head gets a tensor of its own, a copy of the embedding it was tied to."""


@dataclass(frozen=True)
class Source:
    """A model directory and its changes."""

    directory: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]
    """By the name they are written under; an untied head and its embedding are the same stored bytes."""
    changes: Mapping[str, list[Change]]
    """Of each touched tensor, in the order they are made."""
    untied: bool = False
    """Configuration and tensors differ from the directory's: the head was untied."""

    @classmethod
    def read(cls, directory: Path, patches: Patches, terms: Terms = Terms()) -> "Source":
        """Raises `ResolveError` where the directory is no model, or a patch does not fit it."""
        tensors = model_tensors(directory)
        config = read_json(directory / "config.json")
        if terms.untie:
            tensors, config = _untied(directory, tensors, config)
        tied = ties_embeddings(config, tensors)
        deltas = read_patches([(delta, 1.0) for delta in terms.deltas], tensors, tied)
        applied = read_patches(patches, tensors, tied, terms.blend)
        if any(adapter.copies for adapter, _ in applied):
            from portllm.work.patches import require_same_copies

            require_same_copies(applied, tensors)
        return cls(directory, config, tensors, _in_order(deltas, applied, tensors, terms.blend), terms.untie)

    def fitting(self, patch: Path) -> Adapter:
        """A patch's adapter, checked against these tensors. Raises `ResolveError` where it does not fit."""
        return read_patches([(patch, 1.0)], self.tensors, ties_embeddings(self.config, self.tensors))[0][0]

    def tensor(self, name: str) -> "torch.Tensor":
        """The changed bits of one tensor, as it is stored."""
        from portllm.work.patches import DTYPES, add, read_tensor

        entry = self.tensors[name]
        return add(read_tensor(entry), self.changes.get(name, ()), DTYPES[entry.dtype])


def _untied(
    directory: Path, tensors: Mapping[str, TensorEntry], config: Mapping[str, Any]
) -> tuple[dict[str, TensorEntry], dict[str, Any]]:
    embedding = next((name for name in tensors if last_part(name) in EMBEDDINGS), None)
    if not ties_embeddings(config, tensors) or embedding is None:
        raise ResolveError(f"{directory}: its head is not tied to its embedding: there is nothing to untie")
    return {**tensors, head_name(config): tensors[embedding]}, {**config, "tie_word_embeddings": False}


def _in_order(
    deltas: list[Applied], patches: list[Applied], tensors: Mapping[str, TensorEntry], blend: Blend | None
) -> dict[str, list[Change]]:
    first, then = touched(deltas, tensors), touched(patches, tensors, blend)
    version: dict[str, list[Change]] = {
        name: [*found, Rounding(found[0].parameter, tensors[name].dtype)] for name, found in first.items()
    }
    return {name: [*version.get(name, []), *then.get(name, [])] for name in {**version, **then}}
