"""What a training cost: time, tokens, arithmetic, memory, energy. What the engine knows is read from the engine."""

import math
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from portllm.work.context import RunContext, Summary
from portllm.work.points import Point

PEAK_S = 0.2
_peaks: dict[tuple[str, str, int], float] = {}
"""Measured FLOP/s of this process by device, dtype and threads."""


class Meter:
    """The counters of a training, over all its ranks and all the attempts that it goes on from."""

    def __init__(self, run: RunContext) -> None:
        self.run, self.begun = run, 0.0
        self.earlier: dict[str, float] = {}
        """What attempts before this one had spent when they kept the checkpoint."""
        _reset_peaks(run)
        self.energy = _energy(run)

    def begin(self) -> None:
        """The engine stands: time counts from here."""
        self.begun = self.run.clock()

    def spent(self) -> dict[str, float]:
        """Seconds of all attempts, what was lost to interruptions left out; those of all ranks added up, and their
        joules; the largest rank's memory. Only what can be counted here. Collective.
        """
        here = self.memory() | {"energy_j": self._joules()}
        known = {name: float(value) for name, value in here.items() if value is not None}
        ranks: list[dict[str, float]] = [known] * self.run.world
        if self.run.world > 1:
            distributed.all_gather_object(ranks, known)
        here_s = self.run.clock() - self.begun
        found = {
            "seconds": self.earlier.get("seconds", 0.0) + here_s,
            "rank_s": self.earlier.get("rank_s", 0.0) + here_s * self.run.world,
        }
        for name in known:
            values, earlier = [rank[name] for rank in ranks], self.earlier.get(name, 0.0)
            found[name] = sum(values) + earlier if name == "energy_j" else max(*values, earlier)
        return found

    def read(self, engine: Any, points: Sequence[Point], targets: int) -> Summary:
        """The ledger; `targets`: positions whose logits were needed. Collective."""
        found = self.spent()
        seconds = found["seconds"]
        tokens = sum(point.tokens for point in points)
        arithmetic = flops(engine.module.model, tokens, targets)
        peak = self.run.layout.peak_flops or measured_peak(self.run, engine)
        return {
            **_parameters(engine.module),
            "tokens": tokens,
            "steps": len(points),
            "loss_first": points[0].loss,
            "loss_last": points[-1].loss,
            "train_s": round(seconds, 3),
            "tokens_per_s": round(tokens / max(seconds, 1e-9), 1),
            "flops": arithmetic,
            "peak_flops": peak,
            "utilisation": round(arithmetic / max(found["rank_s"] * peak, 1e-9), 4),
            "earlier_s": round(self.earlier.get("seconds", 0.0), 3),
            "earlier_rank_s": round(self.earlier.get("rank_s", 0.0), 3),
            "energy_j": round(found["energy_j"], 1) if "energy_j" in found else None,
            "peak_rss_bytes": int(found["peak_rss_bytes"]),
            "peak_device_bytes": int(found["peak_device_bytes"]) if "peak_device_bytes" in found else None,
            **_settings(engine, self.run),
        }

    def memory(self) -> dict[str, int | None]:
        """Largest resident and device memory of this process since the meter started, in bytes."""
        status = Path("/proc/self/status").read_text()
        resident = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
        device = None if self.run.device == "cpu" else torch.cuda.max_memory_allocated()
        return {"peak_rss_bytes": resident, "peak_device_bytes": device}

    def _joules(self) -> float | None:
        now = _energy(self.run)
        return None if now is None or self.energy is None else now - self.energy


def flops(model: Any, tokens: int, targets: int) -> float:
    """Floating-point operations that the model itself asks for, without what is computed twice.

    Per token 2 for each weight forward, 2 for the gradient of its input, 2 more where the weight is trained; the head
    at the targets only, the last layer everywhere; nothing for looking up an embedding. Attention's own products are
    left out: below 5 % at the lengths of the tasks.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    outside = {id(p) for module in (embedding, head) if module is not None for p in module.parameters()}
    body = sum(_per_use(p) for p in model.parameters() if id(p) not in outside and _dimensions(p) > 1)
    return float(tokens * body + targets * sum(_per_use(p) for p in head.parameters()))


def _per_use(parameter: Any) -> int:
    count = getattr(parameter, "ds_numel", parameter.numel())
    return int(count) * (6 if parameter.requires_grad else 4)


def _dimensions(parameter: Any) -> int:
    """Under ZeRO-3 a parameter itself is empty."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def measured_peak(run: RunContext, engine: Any) -> float:
    """FLOP/s of one worker's matrix products in the training's dtype; measured once in a process.

    The best of as many as fit into PEAK_S: of four, which take 20 ms, others' work once took half.
    """
    dtype = next(engine.module.parameters()).dtype
    key = (run.device, str(dtype), run.layout.threads)
    if key not in _peaks:
        size = 1024 if run.device == "cpu" else 8192
        left, right = torch.randn(2, size, size, device=run.device).to(dtype)
        until, best = time.perf_counter() + PEAK_S, math.inf
        while time.perf_counter() < until or best == math.inf:
            best = min(best, _seconds(left, right, run))
        _peaks[key] = 2.0 * size**3 / best
    return _peaks[key]


def _seconds(left: torch.Tensor, right: torch.Tensor, run: RunContext) -> float:
    begun = time.perf_counter()
    torch.mm(left, right)
    if run.device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def _parameters(module: Any) -> Summary:
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in module.parameters()]
    return {"trainable_parameters": sum(n for n, moves in sizes if moves), "total_parameters": sum(n for n, _ in sizes)}


def _settings(engine: Any, run: RunContext) -> Summary:
    import deepspeed

    return {
        "zero": int(engine.zero_optimization_stage()),
        "world": run.world,
        "micro_tokens": run.layout.budget,
        "deepspeed": deepspeed.__version__,
    }


def _reset_peaks(run: RunContext) -> None:
    """Starts the peaks anew: a warm worker's own would be that of its largest step so far."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        run.log("peak_rss_bytes counts from the start of the process: /proc/self/clear_refs cannot be written here")
    if run.device != "cpu":
        torch.cuda.reset_peak_memory_stats()


def _energy(run: RunContext) -> float | None:
    """Joules that this worker's GPU has drawn since its driver was loaded (NVML); None where nothing counts them."""
    if run.device == "cpu":
        return None
    with suppress(Exception):  # pynvml raises its own kinds: no library, no permission, a card without the counter
        import pynvml

        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode())
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000
    return None
