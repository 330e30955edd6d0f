"""One training loop for base, update and finetune: a short loop of our own around a DeepSpeed engine.

    plan of global batches → per step: this rank's micro-batches, forward, backward → one optimizer step → curve, ledger

Every training goes through `deepspeed.initialize`, world 1 included; DeepSpeed is imported inside `start` only, since
it takes 2.5 s and pulls in mlflow. The loss of a step is the token loss summed over all targets of the whole global
batch, divided by their number, so ranks, micro-batches and ZeRO stage move rounding only. Nothing depends on what ran
in the process before: seeds and threads are set at the start, and a training owns its model.
"""

import gc
import json
import math
import os
import random
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn

from portllm.errors import StageError
from portllm.study.recipes import Optimization
from portllm.work.batches import Arrays, Batch, Sequences, collate, micro_batches
from portllm.work.context import RunContext, Summary
from portllm.work.deepspeed_config import Trains, deepspeed_config
from portllm.work.loss import SummedLoss, head_blocks, silence_dropout


def train(
    model: Any,
    data: Sequences,
    batches: Sequence[Batch],
    optimization: Optimization,
    trains: Trains,
    run: RunContext,
    out: Path,
    keep: torch.dtype = torch.float32,
) -> Summary:
    """Moves the parameters of `model` that require gradients; returns the ledger.

    Afterwards they hold the fp32 masters rounded to `keep`, on the CPU, complete on every rank. Writes `curve.jsonl`
    (rank 0) and `documents.rank{r}.json` below `out`. Raises StageError for a loss that is not finite.
    """
    config = deepspeed_config(optimization, run.layout, run.world, trains)
    prepare(run, optimization.seed)
    model.train()
    silence_dropout(model)
    if run.layout.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    engine = start(SummedLoss(model), config, optimization, run)
    loop = Loop(engine, data, len(batches), optimization, run)
    begun = run.clock()
    try:
        points = [loop.step(number, batch) for number, batch in enumerate(batches, 1)]
        ledger = measured(engine, points, run.clock() - begun, run) | {"examples": len(data)}
        values = masters(engine, keep)
    finally:
        engine.destroy()
    settle(engine.module, values)
    write_logs(out, points, [loop.mine(batch) for batch in batches], run)
    return ledger


def prepare(run: RunContext, seed: int) -> None:
    """Seeds, threads and the process group: the same state whatever ran in this process before."""
    seed_everything(seed)
    torch.set_num_threads(run.layout.threads)
    join_group(run)
    reset_peaks(run)


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


# ---------------------------------------------------------------------------------------------------------- DeepSpeed


def join_group(run: RunContext) -> None:
    """This process's torch.distributed group: Ray Train's in a gang, else one of this process alone, kept for ever.

    The lone group meets in memory and on the loopback interface: no port, no host name, no other process.
    """
    if not distributed.is_initialized():
        if run.world != 1:
            raise StageError(f"rank {run.rank} of {run.world} has no process group: a gang is started by Ray Train")
        with loopback():
            backend = "gloo" if run.device == "cpu" else "cpu:gloo,cuda:nccl"
            distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
    if distributed.get_world_size() != run.world:
        raise StageError(f"the process group has {distributed.get_world_size()} ranks, this step {run.world}")


@contextmanager
def loopback() -> Iterator[None]:
    """gloo binds to the address of the host's name, which may not resolve; alone it needs no more than `lo`."""
    name, before = "GLOO_SOCKET_IFNAME", os.environ.get("GLOO_SOCKET_IFNAME")
    if before is None and "lo" in {interface for _, interface in socket.if_nameindex()}:
        os.environ[name] = "lo"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)


def start(module: SummedLoss, config: dict[str, Any], optimization: Optimization, run: RunContext) -> Any:
    """A DeepSpeed engine around the loss module, with torch's AdamW over what requires gradients."""
    if run.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("LOCAL_RANK", "0")
    import deepspeed

    deepspeed.utils.logger.setLevel("WARNING")
    weights = moving(module)
    optimizer = torch.optim.AdamW(
        weights, lr=optimization.learning_rate, betas=optimization.betas, weight_decay=optimization.weight_decay
    )
    try:
        return deepspeed.initialize(model=module, model_parameters=weights, optimizer=optimizer, config=config)[0]
    except ValueError as error:
        raise StageError(f"DeepSpeed refuses this training: {error}") from error


def masters(engine: Any, keep: torch.dtype) -> list[Tensor]:
    """Copies of the fp32 masters of what moved, rounded to `keep`, in host memory. Collective."""
    return [master(engine, p).detach().to("cpu", keep, copy=True) for p in moving(engine.module)]


def settle(module: nn.Module, values: list[Tensor]) -> None:
    """Puts the masters in the place of what moved, once the engine has let go of it."""
    for parameter, value in zip(moving(module), values, strict=True):
        parameter.data = value
        parameter.grad = None
    gc.collect()  # engine, hooks and modules refer to each other in circles


def moving(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def master(engine: Any, parameter: nn.Parameter) -> Tensor:
    """The fp32 master of a parameter: its own value in an fp32 training without ZeRO. Collective under ZeRO 1-3."""
    from deepspeed.utils import safe_get_full_fp32_param

    full = safe_get_full_fp32_param(parameter)
    if full is not None:
        return full
    for low, high in zip(*(getattr(engine.optimizer, n, ()) for n in ("fp16_groups", "fp32_groups")), strict=True):
        for mine, fp32 in zip(low, high, strict=True):
            if mine is parameter:
                return fp32
    return parameter


# ---------------------------------------------------------------------------------------------------------------- loop


@dataclass(frozen=True)
class Point:
    """One optimizer step of the training curve."""

    step: int
    loss: float
    """Mean over the global batch's targets, before the step."""
    learning_rate: float
    grad_norm: float
    """Before clipping."""
    tokens: int
    seconds: float

    def values(self) -> dict[str, float]:
        rate = self.tokens / max(self.seconds, 1e-9)
        return {
            "loss": self.loss,
            "learning_rate": self.learning_rate,
            "grad_norm": self.grad_norm,
            "tokens_per_s": round(rate, 1),
        }


@dataclass
class Loop:
    """One rank's side of a training: steps of a DeepSpeed engine over global batches."""

    engine: Any
    data: Sequences
    steps: int
    optimization: Optimization
    run: RunContext

    def step(self, number: int, batch: Batch) -> Point:
        """Optimizer step `number` (from 1) over a global batch. Raises StageError before it moves on a bad loss."""
        if self.run.stop():
            raise StageError(f"stopped before optimizer step {number} of {self.steps}: run it again")
        began = self.run.clock()
        rate = learning_rate(number - 1, self.steps, self.optimization)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        loss = self.mean_loss(batch)
        if not math.isfinite(loss):
            raise StageError(
                f"the loss at optimizer step {number} of {self.steps} is {loss}, for documents "
                f"{self.data.documents_of(batch)}: lower `learning_rate`, or look at these documents"
            )
        norm = gradient_norm(self.engine)
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm() or 0.0) if norm is None else norm
        tokens = int(self.data.lengths[batch].sum())
        point = Point(number, loss, rate, norm, tokens, self.run.clock() - began)
        self.run.point(number, point.values())
        if number % max(1, self.steps // 10) == 0:
            speed = point.values()["tokens_per_s"]
            self.run.log(f"step {number} of {self.steps}: loss {loss:.4f}, {speed:.0f} tokens/s")
        return point

    def mean_loss(self, batch: Batch) -> float:
        """Forward and backward of this rank's share; the whole batch's mean loss.

        DeepSpeed averages gradients over ranks, so the world is in the scale; it must not divide by the accumulation.
        (It would under ZeRO-0 if the tensor handed to `backward` were the module's very output: 0.19.8.)
        """
        count = int(self.data.targets[batch].sum())
        total = torch.zeros((), dtype=torch.float64, device=self.run.device)
        for mine, blocks in self.passes(batch):
            loss = self.engine(*self.tensors(collate(self.data, mine)), blocks)
            self.engine.backward(loss * (self.run.world / count), scale_wrt_gas=False)
            total += loss.detach()
            if not self.engine.is_gradient_accumulation_boundary():
                self.engine.step()
        if self.run.world > 1:
            distributed.all_reduce(total)
        return float(total) / count

    def passes(self, batch: Batch) -> list[tuple[Batch, int]]:
        """This rank's micro-batches, each with the number of head blocks that the fullest rank needs for it."""
        size = self.engine.train_micro_batch_size_per_gpu()
        count, world = self.engine.gradient_accumulation_steps(), self.run.world
        shares = [micro_batches(batch, rank, world, size, count) for rank in range(world)]
        rows = [max(int(self.data.targets[ids].sum()) for ids in same) for same in zip(*shares, strict=True)]
        blocks = [head_blocks(self.engine.module.model, n) for n in rows]
        return list(zip(shares[self.run.rank], blocks, strict=True))

    def mine(self, batch: Batch) -> list[int]:
        """Documents of a global batch that this rank reads."""
        return self.data.documents_of(batch[self.run.rank :: self.run.world])

    def tensors(self, arrays: Arrays) -> tuple[Tensor, ...]:
        return tuple(torch.from_numpy(a).to(self.run.device) for a in (arrays.ids_BT, arrays.rows_N, arrays.targets_N))


def learning_rate(step: int, steps: int, optimization: Optimization) -> float:
    """Learning rate of a step (from 0): linear warm-up to the peak, then the schedule down to 0."""
    warm = math.ceil(optimization.warmup * steps)
    if step < warm:
        return optimization.learning_rate * (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    share = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return optimization.learning_rate * share[optimization.schedule]


def gradient_norm(engine: Any) -> float | None:
    """Norm of the gradients before the step where DeepSpeed does not keep it (fp32 without ZeRO), else None."""
    if engine.zero_optimization_stage() > 0 or engine.fp16_enabled() or engine.bfloat16_enabled():
        return None
    return float(nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None]))


# -------------------------------------------------------------------------------------------------------------- ledger


def measured(engine: Any, points: list[Point], wall: float, run: RunContext) -> Summary:
    """The ledger of a training, from the engine itself where it knows."""
    import deepspeed

    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in engine.module.parameters()]
    tokens = sum(p.tokens for p in points)
    return {
        "trainable_parameters": sum(n for n, moves in sizes if moves),
        "total_parameters": sum(n for n, _ in sizes),
        "tokens": tokens,
        "steps": len(points),
        "loss_first": points[0].loss,
        "loss_last": points[-1].loss,
        "train_s": round(wall, 3),
        "tokens_per_s": round(tokens / max(wall, 1e-9), 1),
        **peaks(run),
        "zero": int(engine.zero_optimization_stage()),
        "world": run.world,
        "deepspeed": deepspeed.__version__,
        "micro_batch": engine.train_micro_batch_size_per_gpu(),
        "accumulation": engine.gradient_accumulation_steps(),
    }


def reset_peaks(run: RunContext) -> None:
    """Starts the peaks anew: a warm worker's own would be that of its largest step so far."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        run.log("peak_rss_bytes counts from the start of the process: /proc/self/clear_refs cannot be written here")
    if run.device != "cpu":
        torch.cuda.reset_peak_memory_stats()


def peaks(run: RunContext) -> dict[str, int | None]:
    """Largest resident and device memory since `reset_peaks`, in bytes."""
    status = Path("/proc/self/status").read_text()
    resident = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    device = None if run.device == "cpu" else torch.cuda.max_memory_allocated()
    return {"peak_rss_bytes": resident, "peak_device_bytes": device}


def write_logs(out: Path, points: list[Point], documents: list[list[int]], run: RunContext) -> None:
    """`documents.rank{r}.json`: documents this rank read, by optimizer step; `curve.jsonl`: the curve, by rank 0."""
    (out / f"documents.rank{run.rank}.json").write_text(json.dumps(documents))
    if run.rank == 0:
        lines = [json.dumps({"step": p.step, **p.values()}) for p in points]
        (out / "curve.jsonl").write_text("\n".join(lines) + "\n")
