"""`make bench-score`: requests scored by this tool and by lm-eval's HFLM, one process, same threads, side by side.

HFLM runs at each of several batch sizes and counts at its best; both take turns, medians count. The bound is the time
of the bare forward pass (no head) over the distinct inputs, without padding: it can be passed where inputs share their
beginnings, and because the last layer runs only where it is read. `grid` compares one version × five patches × three
tasks with fifteen `lm_eval run` processes.
"""

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from portllm.formats import lmeval
from portllm.lm import ScorerLM
from portllm.work.head import body

DATA = Path(__file__).parents[3] / "shared" / "data"
BATCHES = (1, 8, 16, 32, 64)
MEMORY = 0.6 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
"""Bytes that HFLM's logits may take: larger batches are left out."""
SHAPES = {
    "15M, 32k vocabulary": (256, 768, 8, 32_000),
    "60M, 128k vocabulary": (384, 1152, 6, 128_000),
}
"""Hidden size, inner size, layers, vocabulary: random weights do for speed."""


def random_model(shape: tuple[int, ...]) -> Any:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    config = transformers.LlamaConfig(
        **dict(zip(names, shape, strict=True)),
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def models(gemma: Path | None, dtype: str) -> dict[str, tuple[Callable[[], Any], Path]]:
    """Name → (how to make it, where its tokenizer lies)."""
    home = DATA / "models" / "home-12M"
    found: dict[str, tuple[Callable[[], Any], Path]] = {
        "home-12M, 8k vocabulary": (lambda: AutoModelForCausalLM.from_pretrained(home, dtype=dtype), home)
    }
    for name, shape in SHAPES.items():
        found[name] = (lambda shape=shape: random_model(shape).to(getattr(torch, dtype)), home)
    if gemma is not None:
        found["Gemma 3 270M, 262k"] = (lambda: AutoModelForCausalLM.from_pretrained(gemma, dtype=dtype), gemma)
    return found


def requests(task: str, limit: int) -> tuple[list[Any], int, str]:
    """(instances, documents, output type)."""
    built = lmeval.build(lmeval.TaskSource(task, data=DATA / "tasks" / task, num_fewshot=0))
    flat = [instance for group in lmeval.instances(built, limit) for instance in group]
    return flat, min(limit, len(lmeval.documents(built))), built.OUTPUT_TYPE


def timed(work: Callable[[], Any]) -> tuple[float, Any, float]:
    """(seconds, result, peak resident GB during it)."""
    Path("/proc/self/clear_refs").write_text("5")
    begun = time.perf_counter()
    found = work()
    seconds = time.perf_counter() - begun
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return seconds, found, int(peak.split()[1]) / 1e6


def bare(model: Any, inputs: set[tuple[int, ...]]) -> float:
    """Seconds of the body alone over as many tokens, in full rows of the inputs' mean length."""
    length = round(statistics.mean(map(len, inputs)))
    ids_BS = torch.randint(5, 1000, (max(1, 2048 // length), length))
    with torch.inference_mode():
        runs = [timed(lambda: body(model)(input_ids=ids_BS, use_cache=False))[0] for _ in range(8)]
    return statistics.median(runs[1:]) * sum(map(len, inputs)) / ids_BS.numel()


def rounds(arms: dict[Any, Callable[[], Any]]) -> dict[Any, tuple[float, Any, float]]:
    """Each arm's (median seconds, result, peak GB) over rounds where each has its turn: five, or 20 s of them."""
    found: dict[Any, list[tuple[float, Any, float]]] = {arm: [] for arm in arms}
    begun = time.perf_counter()
    while not (runs := len(next(iter(found.values())))) or (runs < 5 and time.perf_counter() - begun < 20):
        for arm, work in arms.items():
            found[arm].append(timed(work))
    return {
        arm: (statistics.median(run[0] for run in runs), runs[0][1], max(run[2] for run in runs))
        for arm, runs in found.items()
    }


def compare(name: str, make: Callable[[], Any], where: Path, task: str, limit: int) -> dict[str, Any]:
    model, tokenizer = make(), AutoTokenizer.from_pretrained(where)
    flat, documents, kind = requests(task, limit)
    call = "generate_until" if kind == "generate_until" else "loglikelihood"
    ours = ScorerLM(model, tokenizer)
    getattr(ours, call)(flat[:8])
    arms = {0: lambda: getattr(ours, call)(flat)}
    longest = max(map(len, tokenizer([request.args[0] for request in flat])["input_ids"]))
    for size in BATCHES:
        # HFLM holds the logits of a batch, and their log-softmax beside them.
        if 2 * size * longest * model.config.vocab_size * 4 > MEMORY:
            continue
        theirs = HFLM(
            pretrained=model, tokenizer=tokenizer, batch_size=size, max_length=model.config.max_position_embeddings
        )
        arms[size] = lambda theirs=theirs: getattr(theirs, call)(flat, disable_tqdm=True)
    found = rounds(arms)
    seconds, answers, peak = found.pop(0)
    size, best = min(found.items(), key=lambda arm: arm[1][0])
    inputs = set()
    if call == "loglikelihood":
        inputs = {tuple(ids[:-1]) for ids, _ in ours.encoder.pairs([request.args[:2] for request in flat])}
        worst = max(abs(a[0] - b[0]) for a, b in zip(answers, best[1], strict=True))
    else:
        worst = float(sum(a != b for a, b in zip(answers, best[1], strict=True)))
    return {
        "model": name, "task": task, "documents": documents, "ours": documents / seconds, "hflm": documents / best[0],
        "batch": size, "ratio": best[0] / seconds, "bound": documents / bare(model, inputs) if inputs else float("nan"),
        "peak": peak, "hflm_peak": best[2], "difference": worst,
    }  # fmt: skip


def line(found: dict[str, Any]) -> str:
    return (
        f"| {found['model']} | {found['task']} ({found['documents']}) | {found['hflm']:.1f} (batch {found['batch']}) | "
        f"{found['ours']:.1f} | {found['ratio']:.1f} | {found['bound']:.1f} | {found['peak']:.2f}, "
        f"{found['hflm_peak']:.2f} | {found['difference']:.0e} |"
    )


def grid(model: Path, limit: int) -> str:
    """One version × five patches × three tasks, by `portllm evaluate` and by fifteen processes of lm-eval."""
    from tests.benchmarks.bench_apply import ALL, apart, make_patch

    tasks = ("sst2", "rte", "mrpc")
    with tempfile.TemporaryDirectory() as folder:
        patches = [Path(folder) / f"patch{number}" for number in range(5)]
        for patch in patches:
            apart(make_patch, patch, model, ALL)
        named = [word for patch in patches for word in ("--patch", str(patch))]
        command = [sys.executable, "-m", "portllm", "evaluate", "--model", str(model), "--tasks", ",".join(tasks)]
        ours, _, _ = timed(
            lambda: subprocess.run(
                [*command, *named, "--data-root", str(DATA / "tasks"), "--limit", str(limit), "--json"],
                check=True, stdout=subprocess.DEVNULL,
            )
        )  # fmt: skip
        theirs = sum(
            timed(lambda patch=patch, task=task: _naive(Path(folder), model, patch, task, limit))[0]
            for patch in patches
            for task in tasks
        )
    return f"| {limit} documents a task | {theirs:.0f} s | {ours:.0f} s | {theirs / ours:.1f} |"


def _naive(folder: Path, model: Path, patch: Path, task: str, limit: int) -> None:
    """`lm_eval run` over the same local data, through a task YAML that names them."""
    root = folder / "tasks"
    root.mkdir(exist_ok=True)
    data = DATA / "tasks" / task
    where = lmeval.locate(task)
    files = {"train": str(data / "train.parquet"), "validation": str(data / "validation.parquet")}
    text = {"include": str(where), "task": f"local_{task}", "dataset_path": "parquet", "dataset_name": None,
            "dataset_kwargs": {"data_files": files}}  # fmt: skip
    (root / f"{task}.yaml").write_text(json.dumps(text))
    arguments = {
        "--model": "hf", "--model_args": f"pretrained={model},peft={patch},dtype=float32", "--device": "cpu",
        "--tasks": f"local_{task}", "--include_path": str(root), "--limit": str(limit), "--batch_size": "16",
    }  # fmt: skip
    command = [sys.executable, "-m", "lm_eval", "run", *(word for pair in arguments.items() for word in pair)]
    environment = os.environ | {"HF_DATASETS_CACHE": str(folder / "cache")}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gemma", type=Path, help="Gemma 3 270M as a model directory")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--texts", type=int, default=32, help="documents of a task that generates")
    parser.add_argument("--tasks", default="sst2,boolq,winogrande,gsm8k")
    parser.add_argument("--models", default="", help="substring of the models' names")
    parser.add_argument("--grid", action="store_true")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    if arguments.grid:
        print("| 1 version × 5 patches × 3 tasks | 15 × lm_eval run | portllm evaluate | ratio |\n|---|---|---|---|")
        print(grid(arguments.gemma or DATA / "models" / "home-12M", arguments.limit))
        return
    print("| model | task (documents) | HFLM, items/s | ours | ratio | bound | peak GB, HFLM's | largest difference |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for name, (make, where) in models(arguments.gemma, arguments.dtype).items():
        for task in arguments.tasks.split(","):
            if arguments.models in name:
                limit = arguments.texts if task == "gsm8k" else arguments.limit
                print(line(compare(name, make, where, task, limit)), flush=True)


if __name__ == "__main__":
    main()
