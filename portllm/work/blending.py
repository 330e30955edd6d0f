"""Several deltas of one module made one, where they are more than summed: TIES (Yadav et al., 2023) and DARE (Yu et
al., 2023), on ΔW itself and not on its factors. Every delta comes with its λ multiplied in."""

import hashlib
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from portllm.work.changes import Blend


def blend_deltas(deltas: Sequence[Tensor], how: Blend, module: str) -> Tensor:
    """One fp32 delta of the shape that all have. The same bits on any number of threads: DARE's draws are the module's.

    ties: of each delta the share `density` that is largest, then of each element the mean of those with the elected
    sign. dare: elements kept with probability `density` and divided by it, summed. dare-ties: so kept, then elected.
    """
    if how.method == "ties":
        kept = [_largest(delta, how.density) for delta in deltas]
    else:
        kept = [_drawn(delta, how.density, _generator(how.seed, module, i)) for i, delta in enumerate(deltas)]
    return reduce(torch.add, kept) if how.method == "dare" else _elected(kept)


def _largest(delta: Tensor, density: float) -> Tensor:
    """The elements of largest magnitude; the others are zero."""
    count = max(1, int(density * delta.numel()))
    size = delta.abs()
    threshold = size.flatten().kthvalue(delta.numel() - count + 1).values
    return torch.where(size >= threshold, delta, 0.0)


def _drawn(delta: Tensor, density: float, generator: torch.Generator) -> Tensor:
    keep = torch.rand(delta.shape, generator=generator) < density
    return torch.where(keep, delta / density, 0.0)


def _generator(seed: int, module: str, index: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {index} {module}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _elected(deltas: Sequence[Tensor]) -> Tensor:
    """Mean over the deltas whose sign is that of the sum; zeros have no vote."""
    positive = reduce(torch.add, deltas) >= 0
    total, votes = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
    for delta in deltas:
        agrees = torch.where(positive, delta > 0, delta < 0)
        total += torch.where(agrees, delta, 0.0)
        votes += agrees
    return total / votes.clamp_(min=1)
