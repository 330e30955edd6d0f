"""What a patch is and will do, from the weights alone: no data, no forward pass (issue 4, foresight).

ΔW = s·B·A is never made where its factors tell: with B = Q_B·R_B and Aᵀ = Q_A·R_A, the singular values of ΔW are those
of the R×R core s·R_B·R_Aᵀ. Against a version, one stored tensor is in memory at a time. float64 throughout.
R rank (of two patches together: the sum), I in, O out.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from portllm.errors import ResolveError
from portllm.formats.adapter import Adapter, Target, read_adapter, stored_name
from portllm.formats.tensors import PROVENANCE, TensorEntry, model_tensors, read_json
from portllm.work.changes import Delta, read_patches
from portllm.work.patches import DTYPES, add, delta, read_tensor

Numbers = dict[str, Any]


@dataclass(frozen=True)
class Factors:
    """ΔW_OI = B_OR · A_RI with the scale in B, float64."""

    B_OR: Tensor
    A_RI: Tensor

    @classmethod
    def of(cls, target: Target) -> "Factors":
        B_OR, A_RI = read_tensor(target.B_OR).double(), read_tensor(target.A_RI).double()
        if not (torch.isfinite(B_OR).all() and torch.isfinite(A_RI).all()):
            raise ResolveError(f"{target.A_RI.file}: the factors of `{target.module}` hold NaN or infinity")
        return cls(B_OR * target.scale, A_RI)

    def minus(self, other: "Factors") -> "Factors":
        """The difference, its rank the sum of both."""
        return Factors(torch.cat([self.B_OR, -other.B_OR], dim=1), torch.cat([self.A_RI, other.A_RI]))

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """(U_OR, σ_R descending, V_IR) of ΔW."""
        Q_OR, left = torch.linalg.qr(self.B_OR)
        Q_IR, right = torch.linalg.qr(self.A_RI.T)
        u, sigma, v = torch.linalg.svd(left @ right.T)
        count = len(sigma)
        return Q_OR @ u[:, :count], sigma, Q_IR @ v.T[:, :count]


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


def diagnose(patch: Path, model: Path | None = None, base: Path | None = None, other: Path | None = None) -> Numbers:
    """A patch by itself; against a version θₜ; against that version's update from θ₀; against another patch Δθ'.

    {"modules": {name: numbers}, "total": numbers}. Raises `ResolveError` for what does not fit together.
    """
    version = model_tensors(model) if model else {}
    root = model_tensors(base) if base else {}
    adapter = _adapter(patch, version)
    second = _adapter(other, version) if other else None
    if second and set(second.targets) != set(adapter.targets):
        odd = min(set(second.targets) ^ set(adapter.targets))
        raise ResolveError(f"{other}: `{odd}` is a target of one of the two patches only")
    modules = {name: _module(adapter, second, name, version, root) for name in adapter.targets}
    total = _total(modules.values())
    if version and root:
        total["update"] = update_size(version, root)
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
    origin = read_json(patch / PROVENANCE) if (patch / PROVENANCE).is_file() else {}
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
        "provenance": {k: v for k, v in origin.items() if isinstance(v, str | int | float)},
    }
    fields = ("name", "shape", "rank", "scale")
    modules = [
        dict(zip(fields, kind, strict=True)) | {"count": len(norms), "frobenius": _root_mean(norms)}
        for kind, norms in kinds.items()
    ]
    return {"about": about, "modules": modules}


def _root_mean(values: Sequence[float]) -> float:
    return (sum(x**2 for x in values) / len(values)) ** 0.5


def _adapter(patch: Path, version: Mapping[str, TensorEntry]) -> Adapter:
    """A patch that holds deltas; checked against the version where there is one."""
    adapter = read_patches([(patch, 1.0)], version, tied=False)[0][0] if version else read_adapter(patch)
    if adapter.beyond_deltas or not adapter.targets:
        raise ResolveError(f"{patch}: {adapter.beyond_deltas or 'holds no delta'}: a diagnosis is of deltas only")
    return adapter


def _module(
    adapter: Adapter,
    other: Adapter | None,
    name: str,
    version: Mapping[str, TensorEntry],
    root: Mapping[str, TensorEntry],
) -> Numbers:
    target = adapter.targets[name]
    factors = Factors.of(target)
    U_OR, sigma_R, V_IR = factors.svd()
    found: Numbers = {"rank": target.rank, "shape": list(target.shape), **spectrum(sigma_R)}
    stored = version.get(stored_name(f"{name}.weight", version) or "") if version else None
    W_OI = None if stored is None else _weight(stored, target)
    if stored is not None and W_OI is not None:
        found |= _against(adapter, name, stored, W_OI, found["frobenius"])
    if W_OI is not None and root:
        found |= _overlap(W_OI - _weight(_same(name, stored, root), target), U_OR, V_IR)
    if other is not None:
        found |= _residual(factors, (U_OR, V_IR), Factors.of(other.targets[name]), W_OI, found["frobenius"])
    return found


def _weight(entry: TensorEntry, target: Target) -> Tensor:
    """W_OI, float64."""
    W = read_tensor(entry).double()
    return W.T if target.transposed else W


def _same(name: str, stored: TensorEntry | None, root: Mapping[str, TensorEntry]) -> TensorEntry:
    entry = root.get(stored_name(f"{name}.weight", root) or "")
    if stored is None or entry is None or entry.shape != stored.shape:
        raise ResolveError(f"`{name}`: θ₀ and θₜ hold no weight of the same shape there: not versions of one model")
    return entry


def _against(adapter: Adapter, name: str, stored: TensorEntry, W_OI: Tensor, size: float) -> Numbers:
    """The delta beside the weight, and what the weight's dtype keeps of it."""
    W = read_tensor(stored)
    dW = delta(adapter, name).double()
    moved = add(W, [Delta(adapter, name)], DTYPES[stored.dtype]).double() - W.double()
    touched = dW != 0
    return {
        "weight": float(W_OI.norm()),
        "relative": size / max(float(W_OI.norm()), 1e-300),
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
    found = spectrum(second.minus(first).svd()[1])
    residual: Numbers = {"frobenius": found["frobenius"], "spectral": found["spectral"]}
    residual["of_patch"] = found["frobenius"] / max(size, 1e-300)
    if W_OI is not None:
        residual["of_patched"] = found["frobenius"] / max(float((W_OI + first.B_OR @ first.A_RI).norm()), 1e-300)
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
        total["lost"] = _root_sum(lost, "lost") / max(total["frobenius"], 1e-300)
    if all("residual" in m for m in every):
        total["residual"] = _root_sum([m["residual"] for m in every], "frobenius")
        total["residual_of_patch"] = total["residual"] / max(total["frobenius"], 1e-300)
    return total


def _root_sum(every: Sequence[Numbers], name: str) -> float:
    return float(sum(m[name] ** 2 for m in every) ** 0.5)


def update_size(version: Mapping[str, TensorEntry], root: Mapping[str, TensorEntry]) -> float:
    """‖θₜ − θ₀‖ / ‖θ₀‖ over all tensors, one of them in memory at a time."""
    moved = before = 0.0
    for name, entry in root.items():
        if name not in version or version[name].shape != entry.shape:
            raise ResolveError(f"`{name}`: θ₀ and θₜ hold no tensor of the same shape there: not versions of one model")
        W0 = read_tensor(entry).float()
        moved += float((read_tensor(version[name]).float() - W0).norm(dtype=torch.float64)) ** 2
        before += float(W0.norm(dtype=torch.float64)) ** 2
    return (moved / max(before, 1e-300)) ** 0.5
