"""`python -m tests.gpu.mistral_7b`: training and applying at Mistral 7B's shape on one GPU, without Ray (8 minutes).

Random bfloat16 weights. Every line is a process of its own, which runs a stage function as a worker would and reads
its ledger: device memory is the largest that torch held allocated, host memory the largest resident set. A full-weight
update keeps fp32 masters, gradients and moments on the device (about 18 bytes a parameter, 130 GB); where that does
not fit it is tried again with half the layers, and its line says so.

The last line divides the device memory of LoRA fine-tuning by that of holding the model and adding the patch in place.
The paper's 12.2x compares fine-tuning with porting too; how its memory was measured is not told.

`--layers 2 --hidden 256 --device cpu` makes it small, in float32: the same lines, to see that the script itself works.
"""

import argparse
import json
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

TOKENS, LENGTH, BATCH = 32768, 1024, 8
"""Tokens of an update, of one of its sequences, sequences of a global batch."""
EXAMPLES, EXAMPLE = 96, 128
"""Examples of a patch, and tokens of one; the last four are its answer."""
PAPER = 12.2
VOCABULARY = 32000


def make_model(out: Path, layers: int, hidden: int) -> None:
    """A Mistral checkpoint with random weights in 2 GB shards; random numbers are drawn once and used again."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=hidden * 7 // 2, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=8, sliding_window=None, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = MistralForCausalLM(config).to(torch.bfloat16)
    drawn = (0.02 * torch.randn(max(p.numel() for p in model.parameters()))).to(torch.bfloat16)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(drawn[: parameter.numel()].view_as(parameter) if parameter.dim() > 1 else torch.ones(()))
    model.save_pretrained(out, max_shard_size="2GB")


def make_data(out: Path) -> None:
    """A corpus and a task's examples of random tokens, as the stages `corpus` and `requests` publish them."""
    random = np.random.default_rng(0)
    arrays = {
        "corpus/tokens": random.integers(3, VOCABULARY, TOKENS).astype(np.uint32),
        "corpus/offsets": np.arange(0, TOKENS + 1, 512), "corpus/rows": np.arange(TOKENS // 512),
        "examples/tokens": random.integers(3, VOCABULARY, EXAMPLES * EXAMPLE).astype(np.uint32),
        "examples/offsets": np.arange(0, EXAMPLES * EXAMPLE + 1, EXAMPLE),
        "examples/answers": np.full(EXAMPLES, EXAMPLE - 4), "examples/doc_ids": np.arange(EXAMPLES),
    }  # fmt: skip
    for name, array in arrays.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(out / f"{name}.npy", array)
    (out / "examples" / "meta.json").write_text(json.dumps({"task": "random"}))


def context(work: Path, device: str) -> Any:
    from portllm.study.resources import Layout
    from portllm.work.context import RunContext
    from portllm.work.versions import Versions

    layout = Layout(threads=8, gpus=int(device != "cpu"), micro_tokens=8192, gradient_checkpointing=True)
    log = partial(print, file=sys.stderr)
    return RunContext(work / "scratch", Versions(), layout, device=device, log=log)


def dtype_on(device: str) -> Any:
    """Most CPUs have no units for bfloat16."""
    return "float32" if device == "cpu" else "bfloat16"


def optimization(device: str) -> Any:
    from portllm.study.recipes import Optimization

    return Optimization(learning_rate=1e-5, batch=BATCH, seed=0, dtype=dtype_on(device))


def full_update(work: Path, out: Path, device: str) -> dict[str, Any]:
    from portllm.study.recipes import Update
    from portllm.work.update import update

    recipe = Update("full", tokens=TOKENS, sequence_length=LENGTH, optimization=optimization(device))
    return update(recipe, {"root": work / "model", "corpus": work / "corpus"}, out, context(work, device))


def patch(work: Path, out: Path, device: str) -> dict[str, Any]:
    from portllm.study.recipes import Finetune, Lora
    from portllm.work.finetune import finetune

    inputs = {"root": work / "model", "examples": work / "examples"}
    ledger = finetune(Finetune(Lora(8, 16), optimization(device), epochs=1.0), inputs, out, context(work, device))
    shutil.copytree(out, work / "patch")
    return ledger


def in_place(work: Path, out: Path, device: str) -> dict[str, Any]:
    """The model on the device, the patch added to it and taken off again."""
    import torch

    from portllm.work.ledger import Meter

    run = context(work, device)
    resident = run.open({"root": work / "model"}, dtype_on(device))
    meter, begun = Meter(run), time.perf_counter()
    with resident.applied([(work / "patch", 1.0)]):
        if device != "cpu":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begun
    return {"seconds": seconds, **meter.memory()}


def streaming(work: Path, out: Path, device: str) -> dict[str, Any]:
    """`portllm apply`: from files to files."""
    from portllm.work.apply import How, atomic_apply
    from portllm.work.ledger import Meter

    meter, begun = Meter(context(work, "cpu")), time.perf_counter()
    atomic_apply(work / "model", [(work / "patch", 1.0)], out / "ported", how=How(threads=8))
    return {"seconds": time.perf_counter() - begun, **meter.memory()}


WAYS: dict[str, Callable[[Path, Path, str], dict[str, Any]]] = {
    "update of all weights": full_update, "LoRA r = 8, fine-tuning": patch,
    "patch added in place on the device": in_place, "patch added from files to files": streaming,
}  # fmt: skip


def measured(name: str, work: Path, device: str) -> dict[str, Any] | None:
    """What a way returned; None where its process failed."""
    with tempfile.TemporaryDirectory(dir=work) as out:
        process = multiprocessing.get_context("spawn").Process(target=_child, args=(name, work, Path(out), device))
        process.start()
        process.join()
        found = Path(out) / "found.json"
        return json.loads(found.read_text()) if found.is_file() else None


def _child(name: str, work: Path, out: Path, device: str) -> None:
    (out / "way").mkdir()
    (out / "found.json").write_text(json.dumps(WAYS[name](work, out / "way", device)))


def lines(work: Path, layers: int, hidden: int, device: str) -> Iterator[str]:
    make_data(work)
    full, tuning, adding, streamed = WAYS
    for depth in (layers, layers // 2):
        make_model(work / "model", depth, hidden)
        values = measured(full, work, device)
        yield line(f"{full}, {depth} layers", values)
        if values:
            break
        shutil.rmtree(work / "model")
    if depth != layers or not values:
        make_model(work / "model", layers, hidden)
    tuned, added = (measured(name, work, device) for name in (tuning, adding))
    yield line(tuning, tuned)
    yield line(adding, added)
    yield line(streamed, measured(streamed, work, device))
    if tuned and added and added["peak_device_bytes"]:
        ratio = tuned["peak_device_bytes"] / added["peak_device_bytes"]
        yield f"\nFine-tuning holds {ratio:.1f} times the device memory of adding the patch (the paper: {PAPER})."


def line(name: str, values: dict[str, Any] | None) -> str:
    if values is None:
        return f"| {name} | failed | | | | |"
    gb = ["" if (size := values.get(key)) is None else f"{size / 1e9:.2f}" for key in MEMORY]
    speed = f"{values['tokens_per_s']:.0f}" if "tokens_per_s" in values else ""
    share = f"{100 * values['utilisation']:.1f} %" if "utilisation" in values else ""
    return f"| {name} | {values.get('seconds', values.get('train_s')):.1f} | {speed} | {share} | {' | '.join(gb)} |"


MEMORY = ("peak_device_bytes", "peak_rss_bytes")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    print("| | seconds | tokens/s | utilisation | device GB | host GB |\n|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for text in lines(Path(folder), arguments.layers, arguments.hidden, arguments.device):
            print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
