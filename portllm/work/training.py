"""One training loop for base, update and finetune: a short loop of our own around a DeepSpeed engine.

    plan of global batches → per step: this rank's micro-batches, forward, backward → one optimizer step → curve, ledger

A training that was killed or told to stop goes on from its last checkpoint, on as many ranks as it then has.

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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, distributed, nn

from portllm.errors import Preempted, StageError
from portllm.study.recipes import Optimization
from portllm.study.resources import Trains
from portllm.work import engine_state
from portllm.work.batches import Arrays, Batch, Sequences, collate, micro_batches
from portllm.work.checkpoints import Checkpoints
from portllm.work.context import RunContext, Summary
from portllm.work.deepspeed_config import deepspeed_config
from portllm.work.ledger import Meter
from portllm.work.loss import SummedLoss, head_blocks, require_no_dropout, vocabulary
from portllm.work.points import Point


class Stored(Protocol):
    """How what moves is stored, parameter by parameter."""

    def stored_dtype(self, name: str) -> torch.dtype: ...
    def in_files(self, name: str) -> bool:
        """Whether its bits can be read again."""

    def stored_bits(self, name: str) -> Tensor | None:
        """fp32; None where the model in memory holds them."""


@dataclass(frozen=True)
class Whole:
    """Everything is in memory, and stored in one dtype."""

    dtype: torch.dtype = torch.float32

    def stored_dtype(self, name: str) -> torch.dtype:
        return self.dtype

    def in_files(self, name: str) -> bool:
        return False

    def stored_bits(self, name: str) -> Tensor | None:
        return None


def train(
    model: Any,
    data: Sequences,
    batches: Sequence[Batch],
    optimization: Optimization,
    trains: Trains,
    run: RunContext,
    out: Path,
    stored: Stored = Whole(),
) -> Summary:
    """Moves the parameters of `model` that require gradients; returns the ledger.

    Their fp32 masters begin with the stored bits, whatever dtype is computed in; afterwards they hold the masters
    rounded to the stored dtype (fp32 as a rule), on the CPU, complete on every rank. Writes `curve.jsonl` (rank 0) and
    `documents.rank{r}.json` below `out`. Raises StageError for a loss that is not finite.
    """
    config = deepspeed_config(optimization, run.layout, run.world, trains)
    prepare(run, optimization.seed)
    meter = Meter(run)
    model.train()
    require_no_dropout(model)
    if run.layout.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss = SummedLoss(model)
    if data.joins and not loss.apart:
        run.log(f"{type(model).__name__} does not keep the documents of a sequence apart: it reads them as one text")
    linear = nn.functional.linear
    engine = start(loss, config, optimization, run, stored)
    loop = Loop(engine, data, len(batches), optimization, run, meter)
    try:
        loop.resume()
        for batch in batches[len(loop.points) :]:
            loop.step(batch)
            loop.keep()
        targets = sum(int(data.targets[batch].sum()) for batch in batches)
        ledger = meter.read(engine, loop.points, targets) | loop.about()
        values = masters(engine, stored)
    finally:
        loop.end()
        engine.destroy()
        nn.functional.linear = linear  # ZeRO-3 puts its own there, for whatever this process computes after it
    settle(engine.module, values)
    write_logs(out, loop.points, [loop.mine(batch) for batch in batches], run)
    return ledger


def prepare(run: RunContext, seed: int) -> None:
    """Seeds, threads and the process group: the same state whatever ran in this process before."""
    seed_everything(seed)
    torch.set_num_threads(run.layout.threads)
    join_group(run)


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


def start(
    module: SummedLoss,
    config: dict[str, Any],
    optimization: Optimization,
    run: RunContext,
    stored: Stored,
) -> Any:
    """A DeepSpeed engine around the loss module, with torch's AdamW over what requires gradients."""
    os.environ["DS_ACCELERATOR"] = run.device
    os.environ.setdefault("LOCAL_RANK", "0")
    import deepspeed

    deepspeed.utils.logger.setLevel("WARNING")
    weights = list(engine_state.moving(module).values())
    exact = {} if optimization.dtype == "float32" else _exact(module, stored)
    # Without ZeRO DeepSpeed steps a half precision's optimizer once to make its state: at rate 0, and forgotten.
    optimizer = torch.optim.AdamW(weights, lr=0.0, betas=optimization.betas, weight_decay=optimization.weight_decay)
    try:
        engine = deepspeed.initialize(model=module, model_parameters=weights, optimizer=optimizer, config=config)[0]
    except (ValueError, AssertionError) as error:
        raise StageError(f"DeepSpeed refuses this training: {error}") from error
    engine.basic_optimizer.state.clear()
    for name, weight in engine_state.moving(module.model).items() if optimization.dtype != "float32" else ():
        value = exact.pop(name, None)
        if (value := stored.stored_bits(name) if value is None else value) is not None:
            engine_state.set_master(engine, weight, value)  # DeepSpeed made it from the cast weight
    return engine


def _exact(module: SummedLoss, stored: Stored) -> dict[str, Tensor]:
    """Copies in host memory of what moves and lies in memory alone, before it is cast."""
    found = engine_state.moving(module.model).items()
    return {
        name: weight.data.to("cpu", copy=True)
        for name, weight in found
        if weight.dtype == torch.float32 and not stored.in_files(name)
    }


def masters(engine: Any, stored: Stored) -> list[Tensor]:
    """Copies of the fp32 masters of what moved, each rounded to its stored dtype, in host memory. Collective."""
    return [
        engine_state.master(engine, p).detach().to("cpu", stored.stored_dtype(name), copy=True)
        for name, p in engine_state.moving(engine.module.model).items()
    ]


def settle(module: nn.Module, values: list[Tensor]) -> None:
    """Puts the masters in the place of what moved, once the engine has let go of it."""
    for parameter, value in zip(engine_state.moving(module).values(), values, strict=True):
        parameter.data = value
        parameter.grad = None
    gc.collect()  # engine, hooks and modules refer to each other in circles


# ---------------------------------------------------------------------------------------------------------------- loop


EXPLODED = 4.0
"""A loss so many times that of a uniform guess, and of the first step, has left for good."""


@dataclass
class Loop:
    """One rank's side of a training: steps of a DeepSpeed engine over global batches."""

    engine: Any
    data: Sequences
    steps: int
    optimization: Optimization
    run: RunContext
    meter: Meter
    points: list[Point] = field(default_factory=list)
    """Of the optimizer steps taken."""
    resumed: list[int] = field(default_factory=list)
    """Optimizer steps after which the training went on from a checkpoint."""

    def __post_init__(self) -> None:
        self.kept = Checkpoints(self.run.resume, self.run) if self.run.resume else None
        self.meter.begin()

    def resume(self) -> None:
        """Goes on from the newest complete checkpoint, if there is one."""
        about = self.kept.restore(self.engine) if self.kept else None
        if about is not None:
            self.points = [Point(**point) for point in about["points"]]
            self.resumed = [*about["resumed"], len(self.points)]
            self.meter.earlier = about.get("spent", {})
            self.run.log(f"goes on after optimizer step {len(self.points)} of {self.steps}")

    def keep(self) -> None:
        """A checkpoint where one is due. Raises Preempted, after a checkpoint, where the step is to stop."""
        if len(self.points) == self.steps:
            return
        stop, due = self.agreed(self.run.stop(), self.kept is not None and self.kept.due)
        # Under float16 a step that overflows is left out: before the first one that is not, there is nothing to keep.
        if self.kept is not None and (stop or due) and engine_state.stepped(self.engine):
            points = [asdict(point) for point in self.points]
            about = {"points": points, "resumed": self.resumed, "spent": self.meter.spent()}
            self.kept.save(self.engine, len(self.points), about)
        if stop:
            raise Preempted(f"stopped after optimizer step {len(self.points)} of {self.steps}: run it again")

    def agreed(self, *said: bool) -> list[bool]:
        """What any rank said."""
        if self.run.world == 1:
            return list(said)
        found = torch.tensor(said, dtype=torch.int32, device=self.run.device)
        distributed.all_reduce(found, distributed.ReduceOp.MAX)
        return [bool(value) for value in found.tolist()]

    def end(self) -> None:
        """Lets a checkpoint that is being written come to its end."""
        if self.kept is not None:
            self.kept.finish()

    def about(self) -> Summary:
        """What the ledger says of the data and of interruptions."""
        return {"examples": len(self.data), "left_out": self.data.left_out, "resumed": self.resumed}

    def step(self, batch: Batch) -> None:
        """The next optimizer step, over a global batch. Raises StageError for a bad loss, or bad gradients."""
        began, number = self.run.clock(), len(self.points) + 1
        rate = learning_rate(number - 1, self.steps, self.optimization)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        loss = self.mean_loss(batch)
        self.require_sane(loss, number, batch)
        norm = gradient_norm(self.engine)
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm() or 0.0) if norm is None else norm
        self.require_finite(norm, number, batch)
        tokens = int(self.data.lengths[batch].sum())
        seconds = self.run.clock() - began
        elapsed_s = seconds + (self.points[-1].elapsed_s if self.points else 0.0)
        point = Point(number, loss, rate, norm, tokens, seconds, elapsed_s)
        self.points.append(point)
        self.run.progress(number, self.steps, **point.values())
        if number % max(1, self.steps // 10) == 0:
            speed = point.values()["tokens_per_s"]
            self.run.log(f"step {number} of {self.steps}: loss {loss:.4f}, {speed:.0f} tokens/s")

    def require_sane(self, loss: float, number: int, batch: Batch) -> None:
        """Raises StageError for a loss that is not finite, or far above that of a model that knows nothing."""
        first = self.points[0].loss if self.points else loss
        if math.isfinite(loss) and loss <= EXPLODED * max(first, math.log(vocabulary(self.engine.module.model))):
            return
        raise self.bad("loss", loss, number, batch)

    def require_finite(self, norm: float, number: int, batch: Batch) -> None:
        """Raises StageError for gradients that are not finite; under float16 DeepSpeed leaves such a step out."""
        if not math.isfinite(norm) and not self.engine.fp16_enabled():
            raise self.bad("norm of the gradients", norm, number, batch)

    def bad(self, what: str, value: float, number: int, batch: Batch) -> StageError:
        return StageError(
            f"the {what} at optimizer step {number} of {self.steps} is {value}, for documents "
            f"{self.data.documents_of(batch)}: lower `learning_rate`, or look at these documents"
        )

    def mean_loss(self, batch: Batch) -> float:
        """Forward and backward of this rank's share; the whole batch's mean loss.

        DeepSpeed averages gradients over ranks, so the world is in the scale.
        """
        count = int(self.data.targets[batch].sum())
        total = torch.zeros((), dtype=torch.float64, device=self.run.device)
        passes = self.passes(batch)
        for number, (mine, blocks) in enumerate(passes, 1):
            self.engine.set_gradient_accumulation_boundary(number == len(passes))
            loss = self.engine(*self.tensors(collate(self.data, mine)), blocks)
            self.engine.backward(loss * (self.run.world / count), scale_wrt_gas=False)
            total += loss.detach()
        if self.run.world > 1:
            distributed.all_reduce(total)
        return float(total) / count

    def passes(self, batch: Batch) -> list[tuple[Batch, int]]:
        """This rank's micro-batches, each with the number of head blocks that the fullest rank needs for it."""
        shares = micro_batches(self.data, batch, self.run.world, self.run.layout.budget)
        rows = [max(int(self.data.targets[ids].sum()) for ids in same) for same in zip(*shares, strict=True)]
        blocks = [head_blocks(self.engine.module.model, n) for n in rows]
        return list(zip(shares[self.run.rank], blocks, strict=True))

    def mine(self, batch: Batch) -> list[int | str]:
        """Documents of a global batch that this rank reads."""
        return self.data.documents_of(batch[self.run.rank :: self.run.world])

    def tensors(self, arrays: Arrays) -> tuple[Tensor | None, ...]:
        given = arrays.ids_BT, arrays.positions_BT, arrays.rows_N, arrays.targets_N
        return tuple(None if array is None else torch.from_numpy(array).to(self.run.device) for array in given)


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


def write_logs(out: Path, points: list[Point], documents: list[list[int | str]], run: RunContext) -> None:
    """`documents.rank{r}.json`: documents this rank read, by optimizer step; `curve.jsonl`: the curve, by rank 0."""
    (out / f"documents.rank{run.rank}.json").write_text(json.dumps(documents))
    if run.rank == 0:
        lines = [json.dumps({"step": p.step, **p.values()}) for p in points]
        (out / "curve.jsonl").write_text("\n".join(lines) + "\n")
