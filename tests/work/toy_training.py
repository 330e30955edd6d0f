"""A tiny training that tests run in their own process, and `python toy_training.py RANK WORLD DIR` in others."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import MistralConfig, MistralForCausalLM

from portllm.study.recipes import Lora, Optimization
from portllm.study.resources import Layout
from portllm.work.batches import Batch, Sequences, examples, finetune_batches, update_batches
from portllm.work.context import RunContext, Summary
from portllm.work.lora import attach
from portllm.work.training import train
from portllm.work.versions import Versions

OPTIMIZATION = Optimization(learning_rate=1e-2, batch=8, seed=3)
STEPS = 20
CASES: dict[str, dict[str, Any]] = {
    "zero0": {"layout": Layout(zero=0)},
    "zero1": {"layout": Layout(micro_batch=2)},
    "zero2_lora": {"layout": Layout(), "trains": "lora"},
    "ragged": {"layout": Layout(zero=3, micro_batch=1), "batch": 3},
}
"""What two ranks do. In `ragged` they have 2 sequences and 1, in the last batch 1 and none, under ZeRO-3."""


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


def batches(batch: int = 8) -> list[Batch]:
    """20 global batches; of 3 sequences, 14 with a last one that is smaller."""
    return finetune_batches(data().lengths, batch, STEPS, 1) if batch == 8 else update_batches(40, batch, 1)


def context(out: Path, layout: Layout, rank: int = 0, world: int = 1) -> RunContext:
    return RunContext(out / "scratch", Versions(), layout, rank, world, log=lambda line: None)


def fit(
    out: Path, layout: Layout | None = None, trains: Any = "full", batch: int = 8, rank: int = 0, world: int = 1,
    optimization: Optimization = OPTIMIZATION,
) -> tuple[Any, Summary]:  # fmt: skip
    """Trains a fresh toy model; returns it with its ledger. Its logs are in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    toy, moving = model(), replace(optimization, batch=batch)
    if trains == "lora":
        attach(toy, Lora(4, 8), seed=1)
    run = context(out, layout or Layout(), rank, world)
    return toy, train(toy, data(), batches(batch), moving, trains, run, out)


def losses(out: Path) -> np.ndarray:
    return np.array([json.loads(line)["loss"] for line in (out / "curve.jsonl").open()])


def main(rank: int, world: int, directory: Path) -> None:
    if world > 1:
        store = torch.distributed.FileStore(str(directory / "store"), world)
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    for name, case in CASES.items():
        _, ledger = fit(directory / name, rank=rank, world=world, **case)
        (directory / name / f"ledger.rank{rank}.json").write_text(json.dumps(ledger))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
