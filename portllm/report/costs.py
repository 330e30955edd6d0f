"""What the trainings cost, as in the paper's Table 6: trainable parameters, tokens, device hours, peak memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Step = Mapping[str, Any]


@dataclass(frozen=True)
class Cost:
    """One line of the cost table. None where nothing was measured."""

    name: str
    note: str
    trainings: int
    trainable_parameters: float | None
    """Of one training, mean."""
    tokens: float | None
    """Of one training, mean."""
    device_s: float | None
    """Device seconds of one training, mean."""
    total_device_s: float
    """Device seconds of all of them."""
    peak_rss_bytes: float | None
    """Largest of all."""
    peak_device_bytes: float | None
    utilisation: float | None
    """Share of the device's arithmetic, mean."""
    energy_j: float | None
    """Joules of one training, mean."""


def costs(steps: Sequence[Step]) -> list[Cost]:
    """Cost per arm: port first (it trains nothing), then warm, refit, its tasks, and what all need."""
    warm = [step for step in steps if step["stage"] == "finetune" and _arm(step) == "warm"]
    refits = [step for step in steps if step["stage"] == "finetune" and _t(step) > 0 and step not in warm]
    tasks = dict.fromkeys(str(step["coordinates"]["task"]) for step in refits)
    port = Cost("port", "the old patch is added", 0, 0.0, 0.0, 0.0, 0.0, None, None, None, None)
    lines = [port, _cost("warm", "from the old patch, per patch and version, mean", warm)]
    lines += [_cost("refit", "per patch and version, mean", refits)]
    if len(tasks) > 1:
        lines += [_cost(f"refit · {t}", "", [s for s in refits if s["coordinates"]["task"] == t]) for t in tasks]
    lines += [
        _cost("first patches", "t = 0, needed by both", [s for s in steps if s["stage"] == "finetune" and _t(s) == 0]),
        _cost("updates", "the provider's side", [s for s in steps if s["stage"] == "update"]),
        _cost("base models", "", [s for s in steps if s["stage"] == "base" and s.get("curve")]),
    ]
    return [line for line in lines if line.trainings or line.name in ("port", "refit")]


def device_s(step: Step) -> float | None:
    """Seconds on devices of all attempts; wall seconds times devices where that is all that is known."""
    if step.get("device_s") is not None:
        return float(step["device_s"])
    return None if step.get("wall_s") is None else float(step["wall_s"]) * int(step.get("devices") or 1)


def _t(step: Step) -> int:
    return int((step.get("coordinates") or {}).get("t") or 0)


def _arm(step: Step) -> str | None:
    return (step.get("coordinates") or {}).get("arm")


def _cost(name: str, note: str, steps: Sequence[Step]) -> Cost:
    spent = [s for step in steps if (s := device_s(step)) is not None]
    return Cost(
        name,
        note,
        trainings=len(steps),
        trainable_parameters=_over(steps, "trainable_parameters", _mean),
        tokens=_over(steps, "tokens", _mean),
        device_s=_mean(spent) if spent else None,
        total_device_s=sum(spent),
        peak_rss_bytes=_over(steps, "peak_rss_bytes", max),
        peak_device_bytes=_over(steps, "peak_device_bytes", max),
        utilisation=_over(steps, "utilisation", _mean),
        energy_j=_over(steps, "energy_j", _mean),
    )


def _over(steps: Iterable[Step], name: str, fold: Callable[[list[float]], float]) -> float | None:
    known = [float(value) for step in steps if (value := (step.get("summary") or {}).get(name)) is not None]
    return fold(known) if known else None


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
