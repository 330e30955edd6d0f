"""A tiny training that tests run in their own process, and `python toy_training.py RANK WORLD DIR` in others."""

import contextlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import MistralConfig, MistralForCausalLM

from portllm.errors import Preempted
from portllm.study.recipes import Lora, Optimization
from portllm.study.resources import Layout
from portllm.work.batches import Batch, Sequences, examples, finetune_batches, update_batches, with_targets
from portllm.work.context import RunContext, Summary
from portllm.work.lora import attach
from portllm.work.training import train
from portllm.work.versions import Versions

OPTIMIZATION = Optimization(learning_rate=1e-2, batch=8, seed=3)
STEPS = 20
CASES: dict[str, dict[str, Any]] = {
    "zero0": {"layout": Layout(zero=0)},
    "zero1": {"layout": Layout(micro_tokens=64)},
    "zero2_lora": {"layout": Layout(), "trains": "lora"},
    "ragged": {"layout": Layout(zero=3, micro_tokens=1), "batch": 3},
    "packed": {"layout": Layout(zero=3, micro_tokens=64), "batch": 3, "packed": True},
}
"""What two ranks do. In the last two they have 2 sequences and 1, in the last batch 1 and none, under ZeRO-3."""


def model(seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(seed)
    config = MistralConfig(
        vocab_size=120, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    return MistralForCausalLM(config).to(dtype)


def data(count: int = 40) -> Sequences:
    """Random examples of 5 to 29 tokens, 1 to 3 of them targets; documents are named 100, 101, …"""
    random = np.random.default_rng(0)
    lengths = random.integers(5, 30, count)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = random.integers(0, 120, offsets[-1]).astype(np.uint32)
    return examples(tokens, offsets, lengths - random.integers(1, 4, count), 100 + np.arange(count), 64)


def rows(length: int = 24) -> Sequences:
    """The same documents packed into sequences, two or so in each."""
    of = data()
    starts = length * np.arange(len(of.tokens) // length, dtype=np.int64)
    return with_targets(
        Sequences(of.tokens, starts, starts + length, np.ones_like(starts), of.offsets, of.documents, 64)
    )


def batches(batch: int = 8, packed: bool = False) -> list[Batch]:
    """20 global batches; of 3 sequences, 14 with a last one that is smaller."""
    if packed:
        return update_batches(len(rows()), batch, 1)
    return finetune_batches(data().lengths, batch, STEPS, 1) if batch == 8 else update_batches(40, batch, 1)


def context(out: Path, layout: Layout, rank: int = 0, world: int = 1, stop: int | None = None) -> RunContext:
    """Checkpoints lie in `out`; a training is told to stop after optimizer step `stop`."""
    run = RunContext(out / "scratch", Versions(), layout, rank, world, resume=out / "kept", log=lambda line: None)
    taken: list[int] = []
    run.progress = lambda number, steps, **values: taken.append(number)
    run.stop = lambda: taken[-1] == stop
    return run


def fit(
    out: Path, layout: Layout | None = None, trains: Any = "full", batch: int = 8, rank: int = 0, world: int = 1,
    optimization: Optimization = OPTIMIZATION, stop: int | None = None, packed: bool = False,
) -> tuple[Any, Summary]:  # fmt: skip
    """Trains a fresh toy model, or goes on from what is kept in `out`; returns it with its ledger.

    With `stop` it ends after that optimizer step, by Preempted.
    """
    out.mkdir(parents=True, exist_ok=True)
    toy, moving = model(), replace(optimization, batch=batch)
    if trains == "lora":
        attach(toy, Lora(4, 8), seed=1)
    run = context(out, layout or Layout(), rank, world, stop)
    return toy, train(toy, rows() if packed else data(), batches(batch, packed), moving, trains, run, out)


def losses(out: Path) -> np.ndarray:
    return np.array([json.loads(line)["loss"] for line in (out / "curve.jsonl").open()])


RESUMED: dict[str, dict[str, Any]] = {
    f"{name}_{begun}_to_{then}": {"begun": begun, "then": then, **case}
    for name, case in {
        "zero1": {"layout": Layout(zero=1)}, "zero2": {"layout": Layout(zero=2)},
        "zero3": {"layout": Layout(zero=3, micro_tokens=64), "batch": 3},
        "zero2_lora": {"layout": Layout(zero=2), "trains": "lora"},
    }.items()
    for begun, then in ((2, 2), (2, 1), (1, 2))
}  # fmt: skip
"""Trainings that stop after optimizer step 7 and go on with another number of ranks."""


def halves(directory: Path, rank: int, world: int, begin: bool) -> None:
    """The first 7 steps of every case of `RESUMED` that begins with so many ranks, or the rest of those that end so."""
    for name, case in RESUMED.items():
        arguments = {key: value for key, value in case.items() if key not in ("begun", "then")}
        if begin and case["begun"] == world:
            with contextlib.suppress(Preempted):
                fit(directory / name, rank=rank, world=world, stop=7, **arguments)
        if not begin and case["then"] == world:
            _, ledger = fit(directory / name, rank=rank, world=world, **arguments)
            (directory / name / f"ledger.rank{rank}.json").write_text(json.dumps(ledger))


def main(rank: int, world: int, directory: Path) -> None:
    if world > 1:
        store = torch.distributed.FileStore(str(directory / "store"), world)
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    for name, case in CASES.items():
        _, ledger = fit(directory / name, rank=rank, world=world, **case)
        (directory / name / f"ledger.rank{rank}.json").write_text(json.dumps(ledger))
    for begin in (True, False):
        halves(directory, rank, world, begin)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
