"""What a patch is and will do, from the weights alone: no data, no forward pass (issue 4, foresight).

ΔW = s·B·A is never made where its factors tell: with B = Q_B·R_B and Aᵀ = Q_A·R_A, the singular values of ΔW are those
of the R×R core s·R_B·R_Aᵀ. Against a version, one stored tensor is in memory at a time. float64 throughout.
R rank (of two patches together: the sum), I in, O out.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from portllm.errors import ResolveError
from portllm.formats.adapter import HEADS, Adapter, Target, last_part, read_adapter, stored_name
from portllm.work.changes import Delta
from portllm.work.factors import Factors, stacked
from portllm.work.patches import add, delta
from portllm.work.provenance import provenance
from portllm.work.source import Source

Numbers = dict[str, Any]


def spectrum(sigma_R: Tensor) -> Numbers:
    """Norms of a matrix by its singular values, its effective rank and the share of energy in each direction.

    The effective rank is exp of the entropy of the energies σ²/Σσ² (Roy and Vetterli, 2007).
    """
    energy_R = sigma_R**2
    total = float(energy_R.sum())
    share_R = energy_R / total if total else energy_R
    entropy = -(share_R * share_R.clamp(min=1e-300).log()).sum()
    return {
        "frobenius": total**0.5,
        "spectral": float(sigma_R.max()),
        "effective_rank": float(entropy.exp()) if total else 0.0,
        "energy": [round(float(x), 6) for x in share_R],
    }


def angles(first: Tensor, second: Tensor) -> list[float]:
    """Principal angles in degrees, ascending, between the spaces of two orthonormal bases."""
    cosines = torch.linalg.svdvals(first.T @ second).clamp(0, 1)
    return [round(float(x), 3) for x in torch.rad2deg(torch.acos(cosines))]


def diagnose(
    patch: Path, version: Source | None = None, base: Source | None = None, other: Path | None = None,
    dtype: torch.dtype | None = None,
) -> Numbers:  # fmt: skip
    """A patch by itself; against a version θₜ; against that version's update from θ₀; against another patch Δθ'.

    {"modules": {name: numbers}, "total": numbers}. `dtype`: of the output, for what rounding loses; None is the
    version's own. Raises `ResolveError` for what does not fit together.
    """
    adapter = _adapter(patch, version)
    second = _adapter(other, version) if other else None
    if second and set(second.targets) != set(adapter.targets):
        odd = min(set(second.targets) ^ set(adapter.targets))
        raise ResolveError(f"{other}: `{odd}` is a target of one of the two patches only")
    for name, target in adapter.targets.items():
        if second and (shape := second.targets[name].shape) != target.shape:
            raise ResolveError(f"{other}: `{name}` is {list(shape)}, in {patch} {list(target.shape)}: not patches of "
                               "one model")  # fmt: skip
    modules = {name: _module(adapter, second, name, version, base, dtype) for name in adapter.targets}
    total = _total(modules.values())
    if version and base:
        total["update"] = update_size(version, base)
    return {"modules": modules, "total": total}


def inspect(patch: Path) -> Numbers:
    """What a patch is: {"about": settings and sizes, "modules": its kinds of module, norms as root mean squares}."""
    adapter = read_adapter(patch)
    kinds: dict[tuple[Any, ...], list[float]] = {}
    for name, target in adapter.targets.items():
        kind = (name.rpartition(".")[2], target.shape, target.rank, target.scale)
        kinds.setdefault(kind, []).append(spectrum(Factors.of(target).svd()[1])["frobenius"])
    targets = adapter.targets.values()
    size = sum(t.A_RI.nbytes + t.B_OR.nbytes for t in targets)
    about = {
        "patch": str(patch),
        "base": adapter.base,
        "rank": sorted({t.rank for t in targets}),
        "alpha": sorted({t.alpha for t in targets}),
        "dtype": sorted({t.A_RI.dtype for t in targets}),
        "targets": len(adapter.targets),
        "parameters": sum(t.rank * sum(t.shape) for t in targets),
        "bytes": size,
        "also": adapter.beyond_deltas,
        "provenance": _flat(provenance(patch) or {}),
    }
    fields = ("name", "shape", "rank", "scale")
    modules = [
        dict(zip(fields, kind, strict=True)) | {"count": len(norms), "frobenius": _root_mean(norms)}
        for kind, norms in kinds.items()
    ]
    return {"about": about, "modules": modules}


def _flat(facts: Numbers, before: str = "") -> Numbers:
    """What a screen shows of a provenance: its single values, `source.sha256` and the like."""
    found: Numbers = {}
    for name, value in facts.items():
        if isinstance(value, dict) and name not in ("files", "recipe", "libraries"):
            found |= _flat(value, f"{before}{name}.")
        elif isinstance(value, str | int | float):
            found[f"{before}{name}"] = value
    return found


def _root_mean(values: Sequence[float]) -> float:
    return (sum(x**2 for x in values) / len(values)) ** 0.5


def _adapter(patch: Path, version: Source | None) -> Adapter:
    """A patch that holds deltas; checked against the version where there is one."""
    adapter = version.fitting(patch) if version else read_adapter(patch)
    if adapter.beyond_deltas or not adapter.targets:
        raise ResolveError(f"{patch}: {adapter.beyond_deltas or 'holds no delta'}: a diagnosis is of deltas only")
    return adapter


def _module(
    adapter: Adapter, other: Adapter | None, name: str, version: Source | None, base: Source | None,
    dtype: torch.dtype | None,
) -> Numbers:  # fmt: skip
    target = adapter.targets[name]
    factors = Factors.of(target)
    U_OR, sigma_R, V_IR = factors.svd()
    found: Numbers = {"rank": target.rank, "shape": list(target.shape), **spectrum(sigma_R)}
    W = version.tensor(stored_in(name, version)) if version else None
    W_OI = None if W is None else _turned(W, target)
    if W is not None and W_OI is not None:
        found |= _against(adapter, name, W, found["frobenius"], dtype or W.dtype)
        if base:
            W0_OI = _turned(_before(name, W, base), target)
            found |= _overlap(W_OI - W0_OI, U_OR, V_IR)
            found["update_relative"] = found["update"] / max(float(W0_OI.norm()), 1e-300)
    if other is not None:
        found |= _residual(factors, (U_OR, V_IR), Factors.of(other.targets[name]), W_OI, found["frobenius"])
    return found


def stored_in(module: str, version: Source) -> str:
    """The stored tensor of a module's weight."""
    name = stored_name(f"{module}.weight", version.tensors)
    assert name is not None, "the patch was checked against the version"
    return name


def _turned(W: Tensor, target: Target) -> Tensor:
    """W_OI, float64."""
    return W.double().T if target.transposed else W.double()


def _before(module: str, W: Tensor, base: Source) -> Tensor:
    name = stored_name(f"{module}.weight", base.tensors)
    if name is None or base.tensors[name].shape != tuple(W.shape):
        raise ResolveError(f"`{module}`: θ₀ and θₜ hold no weight of the same shape there: not versions of one model")
    return base.tensor(name)


def _against(adapter: Adapter, name: str, W: Tensor, size: float, dtype: torch.dtype) -> Numbers:
    """The delta beside the weight, and what the output's dtype keeps of it."""
    dW = delta(adapter, name).double()
    moved = add(W, [Delta(adapter, name)], dtype).double() - W.to(dtype).double()
    touched = dW != 0
    norm = float(W.double().norm())
    return {
        "weight": norm,
        "relative": size / max(norm, 1e-300),
        "lost": float((moved - dW).norm()) / max(size, 1e-300),
        "absorbed": float(((moved == 0) & touched).sum()) / max(int(touched.sum()), 1),
    }


def _overlap(update_OI: Tensor, U_OR: Tensor, V_IR: Tensor) -> Numbers:
    """Share of the update's energy in the patch's output and input space; by chance it would be R/O and R/I."""
    energy = max(float(update_OI.norm()) ** 2, 1e-300)
    return {
        "update": energy**0.5,
        "overlap_out": float((U_OR.T @ update_OI).norm()) ** 2 / energy,
        "overlap_in": float((update_OI @ V_IR).norm()) ** 2 / energy,
    }


def _residual(
    first: Factors, spaces: tuple[Tensor, Tensor], second: Factors, W_OI: Tensor | None, size: float
) -> Numbers:
    """R = Δθ' − Δθ: Δθ is the patch asked about, Δθ' the other one."""
    U_OR, _, V_IR = second.svd()
    found = spectrum(stacked([second, first.times(-1)]).svd()[1])
    residual: Numbers = {"frobenius": found["frobenius"], "spectral": found["spectral"]}
    residual["of_patch"] = found["frobenius"] / max(size, 1e-300)
    if W_OI is not None:
        residual["patched"] = float((W_OI + first.B_OR @ first.A_RI).norm())
        residual["of_patched"] = found["frobenius"] / max(residual["patched"], 1e-300)
    residual["angles_out"], residual["angles_in"] = angles(spaces[0], U_OR), angles(spaces[1], V_IR)
    return {"residual": residual}


def _total(modules: Iterable[Numbers]) -> Numbers:
    """Over all modules: Frobenius norms add in squares, the spectral norm is the largest."""
    every = list(modules)
    total: Numbers = {
        "modules": len(every),
        "parameters": sum(m["rank"] * sum(m["shape"]) for m in every),
        "frobenius": _root_sum(every, "frobenius"),
        "spectral": max(m["spectral"] for m in every),
        "effective_rank": sum(m["effective_rank"] for m in every) / len(every),
    }
    if all("weight" in m for m in every):
        total["relative"] = total["frobenius"] / max(_root_sum(every, "weight"), 1e-300)
        lost = [m | {"lost": m["lost"] * m["frobenius"]} for m in every]
        total["absorbed"] = sum(m["absorbed"] * math.prod(m["shape"]) for m in every) / sum(
            math.prod(m["shape"]) for m in every
        )
        total["lost"] = _root_sum(lost, "lost") / max(total["frobenius"], 1e-300)
    if all("residual" in m for m in every):
        total["residual"] = _root_sum([m["residual"] for m in every], "frobenius")
        total["residual_spectral"] = max(m["residual"]["spectral"] for m in every)
        for side in ("angles_out", "angles_in"):
            total[side] = sum(sum(m["residual"][side]) / len(m["residual"][side]) for m in every) / len(every)
        total["residual_of_patch"] = total["residual"] / max(total["frobenius"], 1e-300)
    if all("patched" in m.get("residual", ()) for m in every):
        patched = _root_sum([m["residual"] for m in every], "patched")
        total["residual_of_patched"] = total["residual"] / max(patched, 1e-300)
    if all("overlap_out" in m for m in every):
        moved = max(sum(m["update"] ** 2 for m in every), 1e-300)
        for side in ("overlap_out", "overlap_in"):
            total[side] = sum(m[side] * m["update"] ** 2 for m in every) / moved
    return total


def _root_sum(every: Sequence[Numbers], name: str) -> float:
    return float(sum(m[name] ** 2 for m in every) ** 0.5)


def update_size(version: Source, base: Source) -> float:
    """‖θₜ − θ₀‖ / ‖θ₀‖ over the weights of both, one of them in memory at a time."""
    found = _counterparts(version, base)
    pairs = {name: theirs for name, theirs in found.items() if theirs is not None}
    odd = [name for name in version.tensors.keys() - pairs.keys() if not _is_beside(name, version)]
    odd += [name for name in base.tensors.keys() - set(pairs.values()) if not _is_beside(name, base)]
    odd += [name for name, other in pairs.items() if base.tensors[other].shape != version.tensors[name].shape]
    if odd:
        raise ResolveError(f"`{min(odd)}`: θ₀ and θₜ hold no tensor of the same shape there: not versions of one model")
    moved = before = 0.0
    for name, other in pairs.items():
        W0 = base.tensor(other).float()
        moved += float((version.tensor(name).float() - W0).norm(dtype=torch.float64)) ** 2
        before += float(W0.norm(dtype=torch.float64)) ** 2
    return (moved / max(before, 1e-300)) ** 0.5


def _counterparts(version: Source, base: Source) -> dict[str, str | None]:
    """θ₀'s tensor for each of θₜ; one of them may have the names that the other is loaded under
    (`formats.adapter.stored_name`)."""
    loaded = {stored_name(name, version.tensors): name for name in base.tensors}
    return {name: stored_name(name, base.tensors) or loaded.get(name) for name in version.tensors}


def _is_beside(name: str, source: Source) -> bool:
    """Whether a tensor is no weight of its own, which transformers does not save again: a buffer, or a tied head."""
    buffer = name.endswith(".inv_freq") or len(source.tensors[name].shape) not in (1, 2, 3)
    return buffer or (last_part(name) in HEADS and source.config.get("tie_word_embeddings") is True)
