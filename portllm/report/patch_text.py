"""Patches in words: what one is, whether it fits, what it will do. Plain values in, text out."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from portllm.errors import printable

Numbers = Mapping[str, Any]


def inspect_text(facts: Numbers) -> str:
    """One screen about a patch: its settings, and its modules by kind."""
    about = dict(facts["about"])
    about |= about.pop("provenance")
    lines = [f"{name:<18} {_listed(value)}" for name, value in about.items() if value not in (None, "", [], {})]
    lines += ["", f"{'module':<22}{'count':>6}  {'shape':<14}{'rank':>5}{'scale':>8}{'‖ΔW‖':>10}"]
    for kind in facts["modules"]:
        shape = "×".join(map(str, kind["shape"]))
        lines.append(
            f"{printable(kind['name']):<22}{kind['count']:>6}  {shape:<14}{kind['rank']:>5}{kind['scale']:>8.3g}"
            f"{kind['frobenius']:>10.4g}"
        )
    return "\n".join(lines)


def _listed(value: object) -> str:
    return printable(", ".join(map(str, value)) if isinstance(value, list) else str(value))


def check_text(verdict: Numbers, patch: str, model: str) -> str:
    """The verdict in words."""
    head = f"{patch} fits {model}" if verdict["fits"] else f"{patch} does not fit {model}"
    ranks = ", ".join(map(str, verdict["ranks"]))
    lines = [f"{head}: {verdict['targets']} targets, rank {ranks}, onto {verdict['model_dtype']}"]
    lines += [printable(f"  {f['kind']}: `{f['what']}` {f['reason']}") for f in verdict["findings"][:20]]
    more = len(verdict["findings"]) - 20
    return "\n".join([*lines, f"  and {more} more"] if more > 0 else lines)


def combine_text(summary: Numbers) -> str:
    """What a combined patch became, and what its rank cut off."""
    line = f"{summary['out']}: {summary['modules']} modules, rank {summary['rank']}, ‖Δθ‖ {summary['norm']:.4g}"
    if not summary["error"]:
        return f"{line}, exact"
    worst = f"`{summary['worst_module']}` {100 * summary['worst_error']:.2g} %"
    return f"{line}, relative error {100 * summary['error']:.2g} % (worst: {worst})"


_TOTAL = {
    "modules": "modules",
    "parameters": "parameters of A and B",
    "frobenius": "‖Δθ‖ (Frobenius)",
    "spectral": "largest singular value",
    "effective_rank": "effective rank, mean over modules",
    "relative": "‖Δθ‖ / ‖θₜ‖ of the patched weights",
    "lost": "error of Δθ after rounding, relative",
    "absorbed": "weights that rounding leaves as they were",
    "update": "‖θₜ − θ₀‖ / ‖θ₀‖",
    "residual": "‖Δθ' − Δθ‖",
    "residual_spectral": "largest singular value of Δθ' − Δθ",
    "residual_of_patch": "‖Δθ' − Δθ‖ / ‖Δθ‖",
    "residual_of_patched": "‖Δθ' − Δθ‖ / ‖θₜ + Δθ‖",
    "angles_out": "degrees between the outputs of both, mean",
    "angles_in": "degrees between the inputs of both, mean",
    "overlap_out": "share of the update in Δθ's outputs",
    "overlap_in": "share of the update in Δθ's inputs",
}
_COLUMNS = {
    "frobenius": "‖ΔW‖", "spectral": "σ₁", "effective_rank": "eff.rank", "relative": "‖ΔW‖/‖W‖", "lost": "lost",
    "absorbed": "absorbed", "update_relative": "‖θₜ−θ₀‖/‖θ₀‖", "overlap_out": "in update", "overlap_in": "in upd.ᵀ",
}  # fmt: skip


def diagnose_text(found: Numbers) -> str:
    """The total, then a line per kind of module: means over layers."""
    lines = [f"{words:<38} {_number(found['total'][name])}" for name, words in _TOTAL.items() if name in found["total"]]
    kinds: dict[str, list[Numbers]] = defaultdict(list)
    for module, numbers in found["modules"].items():
        kinds[module.rpartition(".")[2]].append(numbers)
    names = [name for name in _COLUMNS if all(name in numbers for numbers in found["modules"].values())]
    lines += ["", f"{'mean over layers':<18}" + "".join(f"{_COLUMNS[name]:>13}" for name in names)]
    for kind, members in kinds.items():
        lines.append(f"{kind:<18}" + "".join(f"{_number(_mean(members, name)):>13}" for name in names))
    return "\n".join(lines)


def _mean(members: Iterable[Numbers], name: str) -> float:
    values = [float(numbers[name]) for numbers in members]
    return sum(values) / len(values)


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
