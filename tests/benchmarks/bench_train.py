"""`make bench-train`: trainings by this tool, by `transformers.Trainer` and by Trainer with DeepSpeed, same documents.

Every training runs in a process of its own with all cores as threads; the clock starts at its first optimizer step.
Tokens are those of the documents: padding is no work done. Trainer gets the documents as they are and pads a batch to
its longest; its loss is over the same targets.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

DATA = Path(__file__).parents[3] / "shared" / "data"
HOME = DATA / "models" / "home-12M"
CORES = len(os.sched_getaffinity(0))


def prepare(root: Path, where: Path) -> None:
    """A corpus of instructions and the examples of SST-2 for a model's tokenizer."""
    from portllm.study.recipes import Corpus, Requests, Text
    from portllm.work.corpora import corpus
    from portllm.work.requests import requests

    run = context(where)
    text = Text("parquet", template="{instruction}\n{input}\n{output}")
    inputs = {"tokenizer": root, "source": DATA / "corpora" / "gpteacher_instruct.parquet"}
    for name in ("corpus", "examples"):
        (where / name).mkdir(parents=True)
    corpus(Corpus(text), inputs, where / "corpus", run)
    task = {"tokenizer": root, "data": DATA / "tasks" / "sst2"}
    requests(Requests("sst2", "train", "0.4.13", examples=1600), task, where / "examples", run)


def context(where: Path) -> Any:
    from portllm.study.resources import Layout
    from portllm.work.context import RunContext
    from portllm.work.versions import Versions

    return RunContext(where / "scratch", Versions(), Layout(threads=CORES), log=lambda line: None)


def recipe(case: dict[str, Any]) -> Any:
    from portllm.study.recipes import Finetune, Lora, Optimization, Update

    optimization = Optimization(learning_rate=1e-4, batch=case["batch"], seed=0, dtype=case["dtype"])
    lora = Lora(8, 16) if case["method"] == "lora" else None
    if case["kind"] == "finetune":
        return Finetune(lora, optimization, steps=case["steps"])
    tokens = case["steps"] * case["batch"] * case["length"]
    return Update(case["method"], tokens=tokens, sequence_length=case["length"], optimization=optimization, lora=lora)


def ours(case: dict[str, Any], root: Path, where: Path, out: Path) -> float:
    """Tokens a second of a stage function."""
    from portllm.work.finetune import finetune
    from portllm.work.update import update

    stage, data = (finetune, "examples") if case["kind"] == "finetune" else (update, "corpus")
    run = context(where)
    ledger = stage(recipe(case), {"root": root, data: where / data}, out, run)
    gb = ledger["peak_rss_bytes"] / 1e9, expected(case, root, run.layout) / 1e9
    print(f"  {case['model']} {case['kind']} {case['dtype']}: {gb[0]:.2f} GB, expected {gb[1]:.2f}, "
          f"utilisation {ledger['utilisation']:.2f}", file=sys.stderr)  # fmt: skip
    return float(ledger["tokens_per_s"])


def expected(case: dict[str, Any], root: Path, layout: Any) -> int:
    """Bytes that a plan reckons with."""
    from portllm.formats.tensors import model_tensors, storage_dtype
    from portllm.resolve.shapes import from_tensors, load_config
    from portllm.study.estimate import memory
    from portllm.study.steps import Step

    tensors = model_tensors(root)
    shape = from_tensors(
        {n: tuple(t.shape) for n, t in tensors.items()}, load_config(root / "config.json"), storage_dtype(tensors)
    )
    return memory(Step("", case["kind"], "", recipe(case), {}, layout), shape)


def documents(case: dict[str, Any], where: Path) -> list[dict[str, Any]]:
    """The documents of our own training, as lists of token ids and labels, in our own order."""
    from portllm.work.batches import examples, finetune_batches
    from portllm.work.requests import open_examples

    if case["kind"] == "finetune":
        found = open_examples(where / "examples")
        data = examples(found.tokens, found.offsets, found.answers, found.doc_ids, None)
        chosen = [i for batch in finetune_batches(data.lengths, case["batch"], case["steps"], 0) for i in batch]
        rows = [(found.tokens[data.starts[i] : data.ends[i]].astype(np.int64), int(data.answers[i])) for i in chosen]
        return [{"input_ids": ids.tolist(), "labels": [-100] * first + ids[first:].tolist()} for ids, first in rows]
    tokens, offsets = np.load(where / "corpus" / "tokens.npy", mmap_mode="r"), np.load(where / "corpus" / "offsets.npy")
    end = int(np.searchsorted(offsets, case["steps"] * case["batch"] * case["length"], side="right"))
    rows = [tokens[a:b].astype(np.int64)[: case["length"]].tolist() for a, b in pairwise(offsets[:end])]
    return [{"input_ids": ids, "labels": ids} for ids in rows]


def trainer(case: dict[str, Any], root: Path, where: Path, out: Path, deepspeed: bool = False) -> float:
    """Tokens a second of transformers.Trainer on the same documents."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments
    from transformers.data.data_collator import DataCollatorForSeq2Seq

    torch.set_num_threads(CORES)
    settings = {}
    if deepspeed:
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
                       "MASTER_PORT": "29511", "DS_ACCELERATOR": "cpu"}  # fmt: skip
        settings["deepspeed"] = {
            "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto", "zero_optimization": {"stage": 0}, "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": case["dtype"] == "bfloat16"},
        }  # fmt: skip
    arguments = TrainingArguments(
        output_dir=str(out), per_device_train_batch_size=case["batch"], num_train_epochs=1, learning_rate=1e-4,
        use_cpu=True, report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
        bf16=deepspeed and case["dtype"] == "bfloat16", remove_unused_columns=False, optim="adamw_torch", **settings,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(root, dtype=getattr(torch, case["dtype"]))
    if case["method"] == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(
            model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        )
    tokenizer = AutoTokenizer.from_pretrained(root)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows, clock = documents(case, where), {}

    class Clock(TrainerCallback):
        def on_train_begin(self, *arguments: Any, **named: Any) -> None:
            clock["begun"] = time.perf_counter()

        def on_train_end(self, *arguments: Any, **named: Any) -> None:
            clock["ended"] = time.perf_counter()

    collator = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8 if case["kind"] == "finetune" else None)
    Trainer(model, arguments, data_collator=collator, train_dataset=rows, callbacks=[Clock()]).train()
    return sum(len(row["input_ids"]) for row in rows) / (clock["ended"] - clock["begun"])


def with_deepspeed(case: dict[str, Any], root: Path, where: Path, out: Path) -> float:
    return trainer(case, root, where, out, deepspeed=True)


def padded(case: dict[str, Any], root: Path, where: Path, out: Path) -> float:
    """Our own loop over the same documents, each a sequence of its own."""

    from portllm.work.batches import Sequences, finetune_batches
    from portllm.work.lora import attach, private_copy
    from portllm.work.training import train
    from portllm.work.update import shape

    run, made = context(where), recipe(case)
    resident = run.open({"root": root}, case["dtype"])
    model = private_copy(resident.model, case["method"])
    if case["method"] == "lora":
        attach(model, shape(made), 0)
    offsets = np.load(where / "corpus" / "offsets.npy")
    end = int(np.searchsorted(offsets, made.tokens, side="right"))
    starts, stops = offsets[: end - 1], np.minimum(offsets[1:end], offsets[: end - 1] + case["length"])
    flat = np.load(where / "corpus" / "tokens.npy", mmap_mode="r")
    data = Sequences(flat, starts, stops, np.ones_like(starts), offsets, np.load(where / "corpus" / "rows.npy"))
    random = finetune_batches(data.lengths, case["batch"], len(data) // case["batch"], 0, window=1)
    ledger = train(model, data, random, made.optimization, case["method"], run, out)
    return float(ledger["tokens_per_s"])


def starting(case: dict[str, Any], root: Path, where: Path, out: Path) -> float:
    """Seconds that a warm process's second training takes before and after its optimizer steps."""
    from portllm.work.finetune import finetune

    run, seconds = context(where), 0.0
    for name in ("first", "second"):
        (out / name).mkdir()
        begun = time.perf_counter()
        ledger = finetune(recipe(case), {"root": root, "examples": where / "examples"}, out / name, run)
        seconds = time.perf_counter() - begun - ledger["train_s"]
    return seconds


WAYS: dict[str, Callable[..., float]] = {
    "portllm": ours, "Trainer": trainer, "Trainer, DeepSpeed": with_deepspeed, "portllm, padded": padded,
}  # fmt: skip


def measured(way: str, case: dict[str, Any], root: Path, where: Path) -> float:
    """One way in a process of its own; not a number where it cannot run."""
    with tempfile.TemporaryDirectory() as out:
        process = multiprocessing.get_context("spawn").Process(target=_child, args=(way, case, root, where, Path(out)))
        process.start()
        process.join()
        found = Path(out) / "speed.json"
        return float(json.loads(found.read_text())) if found.is_file() else float("nan")


def _child(way: str, case: dict[str, Any], root: Path, where: Path, out: Path) -> None:
    speed = (WAYS | {"start": starting})[way](case, root, where, out)
    (out / "speed.json").write_text(json.dumps(speed))


def cases(dtypes: list[str], gemma: bool) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    size = {"batch": 8, "length": 256}
    for dtype in dtypes:
        home, real = {"model": "home", "dtype": dtype}, {"model": "gemma", "dtype": dtype}
        found[f"home-12M, full update, {dtype}"] = {"kind": "update", "method": "full", "steps": 10, **size, **home}
        found[f"home-12M, LoRA on SST-2, {dtype}"] = {
            "kind": "finetune", "method": "lora", "steps": 60, "batch": 16, **home
        }  # fmt: skip
        if gemma:
            found[f"Gemma 3 270M, LoRA on SST-2, {dtype}"] = {
                "kind": "finetune", "method": "lora", "steps": 12, "batch": 16, **real
            }  # fmt: skip
            found[f"Gemma 3 270M, LoRA update, {dtype}"] = {
                "kind": "update",
                "method": "lora",
                "steps": 2,
                **size,
                **real,
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gemma", type=Path, help="a model directory of Gemma 3 270M")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    arguments = parser.parse_args()
    roots = {"home": HOME} | ({"gemma": arguments.gemma} if arguments.gemma else {})
    with tempfile.TemporaryDirectory() as folder:
        for name, root in roots.items():
            prepare(root, Path(folder) / name)
        print("| tokens/s | portllm | Trainer | Trainer, DeepSpeed | portllm, padded | over the better Trainer |")
        print("|---|---|---|---|---|---|", flush=True)
        for name, case in cases(arguments.dtypes.split(","), "gemma" in roots).items():
            if arguments.only not in name:
                continue
            ways = [way for way in WAYS if way != "portllm, padded" or case["kind"] == "update"]
            rounds: dict[str, list[float]] = {way: [] for way in ways}
            for _ in range(arguments.rounds):
                for way in ways:
                    rounds[way].append(measured(way, case, roots[case["model"]], Path(folder) / case["model"]))
            speed = {way: statistics.median(found) for way, found in rounds.items()}
            best = np.nanmax([speed["Trainer"], speed["Trainer, DeepSpeed"]])
            columns = " | ".join(f"{speed.get(way, float('nan')):.0f}" for way in WAYS)
            print(f"| {name} | {columns} | {speed['portllm'] / best:.2f} |", flush=True)
        print("\n| second training of a warm process | seconds besides its steps |\n|---|---|")
        for name, root in roots.items():
            case = {"kind": "finetune", "method": "lora", "steps": 2, "batch": 4, "dtype": "float32"}
            found = [measured("start", case, root, Path(folder) / name) for _ in range(arguments.rounds)]
            print(f"| {name} | {statistics.median(found):.2f} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
