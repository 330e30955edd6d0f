"""`make bench-score`: requests scored by this tool and by lm-eval's HFLM, one process, same threads, side by side.

HFLM runs at each of several batch sizes and at `auto`, and counts at its best; both take turns, medians count. The
bound is the time of the bare forward pass (no head, no padding) over as many tokens as the distinct inputs have, those
of a generated text included: it can be passed where inputs share their beginnings, and because the last layer runs only
where it is read. Each line is measured in a process of its own, so that no memory of another counts. `--grid` compares
one version × five patches × three tasks with fifteen `lm_eval run` processes.
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
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from portllm.formats import lmeval
from portllm.lm import ScorerLM
from portllm.work.head import body
from tests.benchmarks.bench_apply import ALL, apart, make_patch

DATA = Path(__file__).parents[3] / "shared" / "data"
BATCHES = (1, 8, 16, 32, 64, "auto")
OURS = "portllm"
MEMORY = 0.6 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
"""Bytes that HFLM's logits may take: larger batches are left out."""
HOME = DATA / "models" / "home-12M"


@dataclass(frozen=True)
class Case:
    """A model, and how many documents of each task are scored."""

    name: str
    tasks: Mapping[str, int]
    shape: tuple[int, ...] = ()
    """Hidden size, inner size, layers, vocabulary of random weights, which do for speed; else a directory's are read.
    """
    dtype: str = "float32"

    @property
    def is_gemma(self) -> bool:
        return self.name.startswith("Gemma")


SMALL = {"sst2": 100, "winogrande": 100, "boolq": 100, "gsm8k": 16}
CASES = (
    Case("home-12M, 8k vocabulary", SMALL),
    Case("15M, 32k vocabulary", SMALL, (256, 768, 8, 32_000)),
    Case("60M, 128k vocabulary", SMALL, (384, 1152, 6, 128_000)),
    Case("Gemma 3 270M, 262k", {"sst2": 100, "winogrande": 100, "boolq": 64}),
    Case("Gemma 3 270M, 262k, bfloat16", {"sst2": 100, "winogrande": 100, "boolq": 64, "gsm8k": 8}, dtype="bfloat16"),
)


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


def load(case: Case, where: Path) -> Any:
    if case.shape:
        return random_model(case.shape)
    return AutoModelForCausalLM.from_pretrained(where, dtype=case.dtype)


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


def bare(model: Any, tokens: int, inputs: int) -> float:
    """Seconds of the body alone over so many tokens, in full rows of the inputs' mean length."""
    length = round(tokens / inputs)
    ids_BS = torch.randint(5, 1000, (max(1, 2048 // length), length))
    with torch.inference_mode():
        runs = [timed(lambda: body(model)(input_ids=ids_BS, use_cache=False))[0] for _ in range(8)]
    return statistics.median(runs[1:]) * tokens / ids_BS.numel()


def rounds(arms: dict[Any, Callable[[], Any]]) -> dict[Any, tuple[float, Any, float]]:
    """Each arm's (median seconds, result, peak GB) over rounds where each has its turn: five, or a minute of them.

    After the first round it goes on between portllm and what was HFLM's best or came near it.
    """
    found = {arm: [timed(work)] for arm, work in arms.items()}
    best = min(runs[0][0] for arm, runs in found.items() if arm != OURS)
    near = [arm for arm, runs in found.items() if arm == OURS or runs[0][0] < 1.3 * best]
    begun = time.perf_counter()
    while len(found[OURS]) < 5 and time.perf_counter() - begun < 60:
        for arm in near:
            found[arm].append(timed(arms[arm]))
    return {
        arm: (statistics.median(run[0] for run in runs), runs[0][1], max(run[2] for run in runs))
        for arm, runs in found.items()
    }


def hflms(model: Any, tokenizer: Any, longest: int, window: int) -> dict[Any, HFLM]:
    """HFLM by batch size: those whose logits, and their log-softmax beside them, fit into memory.

    `auto` begins with 64 rows of the longest request, `window` tokens where texts are generated, and on a CPU stays
    there: nothing tells it that memory ends.
    """
    rows = {size: 64 * window if size == "auto" else size * longest for size in BATCHES}
    return {
        size: HFLM(
            pretrained=model, tokenizer=tokenizer, batch_size=size, max_length=model.config.max_position_embeddings
        )
        for size, tokens in rows.items()
        if 2 * tokens * model.config.vocab_size * 4 <= MEMORY
    }


def compare(case: Case, where: Path, task: str, limit: int | None) -> None:
    """Prints the line of one task."""
    prepare()
    model, tokenizer = load(case, where), AutoTokenizer.from_pretrained(where)
    flat, documents, kind = requests(task, min(case.tasks[task], limit or case.tasks[task]))
    generates = kind == "generate_until"
    call = "generate_until" if generates else "loglikelihood"
    ours = ScorerLM(model, tokenizer)
    getattr(ours, call)(flat[:8])
    arms = {OURS: lambda: getattr(ours, call)(flat)}
    longest = max(
        map(len, tokenizer(["".join(request.args[: 1 if generates else 2]) for request in flat])["input_ids"])
    )
    window = model.config.max_position_embeddings if generates else longest
    for size, theirs in hflms(model, tokenizer, longest, window).items():
        arms[size] = lambda theirs=theirs: getattr(theirs, call)(flat, disable_tqdm=True)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):  # HFLM prints what it finds at `auto`
        found = rounds(arms)
    seconds, answers, peak = found.pop(OURS)
    size, (best, theirs, their_peak) = min(found.items(), key=lambda arm: arm[1][0])
    if generates:
        asked = tokenizer([request.args[0] + answer for request, answer in zip(flat, answers, strict=True)])
        inputs = {tuple(ids) for ids in asked["input_ids"]}
        difference = f"{sum(a != b for a, b in zip(answers, theirs, strict=True))} texts"
    else:
        inputs = {tuple(ids[:-1]) for ids, _ in ours.encoder.pairs([request.args[:2] for request in flat])}
        difference = f"{max(abs(a[0] - b[0]) for a, b in zip(answers, theirs, strict=True)):.0e}"
    bound = bare(model, sum(map(len, inputs)), len(inputs))
    others = ", ".join(f"{name} {documents / arm[0]:.1f}" for name, arm in found.items() if name != size)
    print(f"| {case.name} | {task} ({documents}) | {documents / best:.1f} ({size}; {others}) "
          f"| {documents / seconds:.1f} | {best / seconds:.1f} | {documents / bound:.1f} "
          f"| {peak:.2f}, {their_peak:.2f} | {difference} |", flush=True)  # fmt: skip


def prepare() -> None:
    logging.disable(logging.WARNING)
    torch.set_num_threads(len(os.sched_getaffinity(0)))


def grid(limit: int) -> str:
    """home-12M: one version × five patches × three tasks, by `portllm evaluate` and by fifteen processes of lm-eval."""
    tasks = ("sst2", "rte", "mrpc")
    with tempfile.TemporaryDirectory() as folder:
        patches = [Path(folder) / f"patch{number}" for number in range(5)]
        for patch in patches:
            apart(make_patch, patch, HOME, ALL)
        named = [word for patch in patches for word in ("--patch", str(patch))]
        command = [sys.executable, "-m", "portllm", "evaluate", "--model", str(HOME), "--tasks", ",".join(tasks)]
        ours, _, _ = timed(
            lambda: subprocess.run(
                [*command, *named, "--data-root", str(DATA / "tasks"), "--limit", str(limit), "--json"],
                check=True, stdout=subprocess.DEVNULL,
            )
        )  # fmt: skip
        theirs = sum(
            timed(lambda patch=patch, task=task: _naive(Path(folder), patch, task, limit))[0]
            for patch in patches
            for task in tasks
        )
    return f"| {limit} documents a task | {theirs:.0f} s | {ours:.0f} s | {theirs / ours:.1f} |"


def _naive(folder: Path, patch: Path, task: str, limit: int) -> None:
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
        "--model": "hf", "--model_args": f"pretrained={HOME},peft={patch},dtype=float32", "--device": "cpu",
        "--tasks": f"local_{task}", "--include_path": str(root), "--limit": str(limit), "--batch_size": "16",
    }  # fmt: skip
    command = [sys.executable, "-m", "lm_eval", "run", *(word for pair in arguments.items() for word in pair)]
    environment = os.environ | {"HF_DATASETS_CACHE": str(folder / "cache")}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--gemma", type=Path, help="Gemma 3 270M as a model directory, for the table; left out without it"
    )
    parser.add_argument("--limit", type=int, help="documents of a task at most")
    parser.add_argument("--tasks", default="sst2,winogrande,boolq,gsm8k")
    parser.add_argument("--models", default="", help="substring of the models' names")
    parser.add_argument("--grid", action="store_true")
    arguments = parser.parse_args()
    if arguments.grid:
        print("| 1 version × 5 patches × 3 tasks | 15 × lm_eval run | portllm evaluate | ratio |\n|---|---|---|---|")
        print(grid(arguments.limit or 100))
        return
    print("| model | task (documents) | HFLM, documents/s (batch) | portllm | ratio | bare forward pass | peak GB, "
          "HFLM's | largest difference |\n|---|---|---|---|---|---|---|---|", flush=True)  # fmt: skip
    for case in CASES:
        if arguments.models in case.name and (arguments.gemma or not case.is_gemma):
            for task in [task for task in case.tasks if task in arguments.tasks.split(",")]:
                apart(compare, case, arguments.gemma if case.is_gemma else HOME, task, arguments.limit)


if __name__ == "__main__":
    main()
