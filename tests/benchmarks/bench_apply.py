"""`make bench-apply`: patches applied, swapped and diagnosed, beside a copy and beside PEFT, in one run.

A checkpoint of Llama's shapes with random bfloat16 weights (or `--model`, a real one), and random adapters. Every way
runs in a process of its own, its output removed before the next one; the ways take turns, and a table holds medians
over the rounds.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TINYLLAMA = {"hidden": 2048, "inner": 5632, "layers": 22, "heads": 32, "kv_heads": 4, "vocabulary": 32000}
"""1.1B parameters: 2.2 GB in bfloat16."""
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
PEFT = """
import sys, time, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama
begun = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
merged = PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload()
merged.save_pretrained(sys.argv[3], max_shard_size="1GB")
print(time.perf_counter() - begun)
"""
WARM = """
import os, sys, time, torch
from pathlib import Path
from portllm.work import patches
from portllm.work.apply import How, atomic_apply
begun = time.perf_counter()
how = How(len(os.sched_getaffinity(0)), durable=len(sys.argv) > 4)
atomic_apply(Path(sys.argv[1]), [(Path(sys.argv[2]), 1.0)], Path(sys.argv[3]), how=how)
print(time.perf_counter() - begun)
"""
"""Both print the seconds after their imports."""


def shapes(size: dict[str, int]) -> dict[str, tuple[int, int]]:
    """(out, in) of a block's linear modules."""
    hidden, inner = size["hidden"], size["inner"]
    narrow = hidden // size["heads"] * size["kv_heads"]
    block = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (narrow, hidden)}
    block |= {"self_attn.v_proj": (narrow, hidden), "self_attn.o_proj": (hidden, hidden)}
    return block | {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}


def make_model(out: Path, size: dict[str, int], shards: int = 3, seed: int = 0) -> Path:
    """Random weights in shards with an index, without building a model."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    out.mkdir(parents=True)
    config = LlamaConfig(
        vocab_size=size["vocabulary"], hidden_size=size["hidden"], intermediate_size=size["inner"],
        num_hidden_layers=size["layers"], num_attention_heads=size["heads"], num_key_value_heads=size["kv_heads"],
        tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(out)
    table = (size["vocabulary"], size["hidden"])
    names = {"model.embed_tokens.weight": table, "lm_head.weight": table, "model.norm.weight": (size["hidden"],)}
    for layer in range(size["layers"]):
        block = {f"{name}.weight": shape for name, shape in shapes(size).items()}
        norms = dict.fromkeys(("input_layernorm.weight", "post_attention_layernorm.weight"), (size["hidden"],))
        names |= {f"model.layers.{layer}.{name}": shape for name, shape in (block | norms).items()}
    torch.manual_seed(seed)
    where, ordered = {}, sorted(names)
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        mine = ordered[shard * len(ordered) // shards : (shard + 1) * len(ordered) // shards]
        save_file({n: (torch.randn(names[n]) * 0.02).bfloat16() for n in mine}, out / file, {"format": "pt"})
        where |= dict.fromkeys(mine, file)
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return out


def make_patch(out: Path, model: Path, targets: list[str], rank: int = 8) -> Path:
    """A random adapter on a model's modules of these names."""
    import torch
    from safetensors.torch import save_file

    from portllm.formats.tensors import model_tensors

    out.mkdir(parents=True)
    tensors = {}
    for name, entry in model_tensors(model).items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in targets and len(entry.shape) == 2:
            rows, columns = entry.shape
            tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, columns) * 0.02
            tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(rows, rank) * 0.02
    save_file(tensors, out / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 16, "target_modules": targets}
    (out / "adapter_config.json").write_text(json.dumps(config))
    return out


def apart(function: Callable[..., object], *arguments: object) -> None:
    """Calls a function in a process of its own: a child's peak memory counts that of whoever started it."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 0


def measure(command: list[str], out: Path) -> tuple[float, float, float]:
    """(seconds, seconds that it prints or else the same, peak resident GB) of a command in a process of its own, or of
    a shell line with its children."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begun
    assert process.stdout and process.stderr
    if status:
        raise SystemExit(f"{command}: {process.stderr.read()}")
    printed = (process.stdout.read().split() or [""])[-1]
    own = float(printed) if printed.replace(".", "").isdigit() else seconds
    return seconds, own, usage.ru_maxrss / 1e6


def ways(model: Path, patch: Path, out: Path) -> dict[str, list[str]]:
    named = ["--model", str(model), "--patch", str(patch), "--out", str(out)]
    ours, plain = [sys.executable, "-m", "portllm", "apply", *named], [str(model), str(patch), str(out)]
    return {
        "cp -r": ["cp", "-r", str(model), str(out)],
        "cp -r, sync": ["sh", "-c", f"cp -r {model} {out} && sync -f {out}/config.json"],
        "portllm apply": ours,
        "portllm apply --durable": [*ours, "--durable"],
        "portllm apply, torch imported": [sys.executable, "-c", WARM, *plain],
        "portllm apply --durable, torch imported": [sys.executable, "-c", WARM, *plain, "durable"],
        "PEFT merge, save": [sys.executable, "-c", PEFT, *plain],
    }


def table(title: str, found: dict[str, list[tuple[float, float, float]]]) -> str:
    base = statistics.median(s for s, _, _ in found["cp -r, sync"])
    lines = [f"| {title} | seconds | after its imports | of the durable copy | peak GB |", "|---|---|---|---|---|"]
    for way, runs in found.items():
        seconds, own, peak = (statistics.median(column) for column in zip(*runs, strict=True))
        lines.append(f"| {way} | {seconds:.2f} | {own:.2f} | {own / base:.2f} | {peak:.2f} |")
    return "\n".join(lines)


def run(commands: dict[str, list[str]], out: Path, rounds: int) -> dict[str, list[tuple[float, float, float]]]:
    found: dict[str, list[tuple[float, float, float]]] = {way: [] for way in commands}
    for _ in range(rounds):
        for way, command in commands.items():
            found[way].append(measure(command, out))
    shutil.rmtree(out, ignore_errors=True)
    return found


def applying(root: Path, model: Path, rounds: int) -> None:
    """A patch applied: seconds and peak memory of every way."""
    for title, targets in (("r = 8 on q, k, v, o", ATTENTION), ("r = 8 on all linear", ALL)):
        patch = root / f"patch{len(targets)}"
        print(table(title, run(ways(model, patch, root / "out"), root / "out", rounds)), "\n", flush=True)


def memory(root: Path, rounds: int) -> None:
    """Peak memory of `portllm apply` on checkpoints of the same layers, few and many."""
    print("| checkpoint | peak GB |\n|---|---|")
    for layers in (3, 43):
        size, model = TINYLLAMA | {"layers": layers}, root / f"model{layers}"
        apart(make_model, model, size)
        apart(make_patch, root / f"patch-of-{layers}", model, ALL)
        command = ways(model, root / f"patch-of-{layers}", root / "out")["portllm apply"]
        peak = max(measure(command, root / "out")[2] for _ in range(rounds))
        total = sum(file.stat().st_size for file in model.glob("*.safetensors")) / 1e9
        print(f"| {total:.1f} GB | {peak:.3f} |", flush=True)
        shutil.rmtree(model)
    print()


def swapping(model: Path, patch: Path, rounds: int) -> None:
    """One patch put on a resident model and taken off again."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    print("| on a resident model | on, s | off, s | weights afterwards |\n|---|---|---|---|")
    for name, swap in (("portllm", _resident), ("PEFT load, merge, unmerge", _pefts)):
        times, same = swap(model, patch, rounds)
        on, off = (statistics.median(column) for column in zip(*times, strict=True))
        print(f"| {name} | {on:.2f} | {off:.3f} | {'the same bits' if same else 'differ'} |", flush=True)
    print()


def _resident(model: Path, patch: Path, rounds: int) -> tuple[list[tuple[float, float]], bool]:
    from portllm.work.resident import Resident

    resident, times = Resident(model, "bfloat16"), []
    before = {name: weight.clone() for name, weight in resident.model.state_dict().items()}
    for _ in range(rounds):
        begun = time.perf_counter()
        with resident.applied([(patch, 1.0)]):
            on = time.perf_counter()
        times.append((on - begun, time.perf_counter() - on))
    return times, _equal(resident.model.state_dict(), before)


def _pefts(model: Path, patch: Path, rounds: int) -> tuple[list[tuple[float, float]], bool]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    plain, times = AutoModelForCausalLM.from_pretrained(model, dtype="auto"), []
    before = {name: weight.clone() for name, weight in plain.state_dict().items()}
    wrapped = PeftModel.from_pretrained(plain, patch, adapter_name="first")
    for number in range(rounds):
        begun = time.perf_counter()
        wrapped.load_adapter(patch, f"patch{number}")
        wrapped.set_adapter(f"patch{number}")
        wrapped.merge_adapter()
        on = time.perf_counter()
        wrapped.unmerge_adapter()
        wrapped.delete_adapter(f"patch{number}")
        times.append((on - begun, time.perf_counter() - on))
    return times, _equal(wrapped.unload().state_dict(), before)


def _equal(first: dict[str, Any], second: dict[str, Any]) -> bool:
    import torch

    return all(torch.equal(first[name], second[name]) for name in second)


def diagnosing(root: Path, model: Path, patch: Path, size: dict[str, int], rounds: int) -> None:
    """`portllm diagnose` against a version and its update."""
    apart(make_model, root / "base", size, 3, 1)
    command = [sys.executable, "-m", "portllm", "diagnose", str(patch)]
    runs = [
        measure([*command, "--model", str(model), "--base", str(root / "base")], root / "out") for _ in range(rounds)
    ]
    alone = [measure(command, root / "out") for _ in range(rounds)]
    print("| portllm diagnose | seconds | peak GB |\n|---|---|---|")
    for name, found in (("the patch alone", alone), ("against θₜ and its update from θ₀", runs)):
        print(f"| {name} | {statistics.median(s for s, _, _ in found):.1f} | {max(p for _, _, p in found):.2f} |")
    print()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=TINYLLAMA["layers"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", type=Path, help="a real model directory: apply and swap only")
    parser.add_argument("--parts", default="apply,memory,swap,diagnose")
    parser.add_argument("--directory", type=Path, help="where about 10 GB are free; default: the temporary directory")
    arguments = parser.parse_args()
    size, rounds, parts = TINYLLAMA | {"layers": arguments.layers}, arguments.rounds, arguments.parts.split(",")
    with tempfile.TemporaryDirectory(dir=arguments.directory) as folder:
        root = Path(folder)
        model = arguments.model or root / "model"
        if arguments.model is None:
            apart(make_model, model, size)
        for targets in (ATTENTION, ALL):
            apart(make_patch, root / f"patch{len(targets)}", model, targets)
        if "apply" in parts:
            applying(root, model, rounds)
        if "swap" in parts:
            apart(swapping, model, root / f"patch{len(ALL)}", rounds)
        if "diagnose" in parts and arguments.model is None:
            diagnosing(root, model, root / f"patch{len(ALL)}", size, rounds)
        if "memory" in parts and arguments.model is None:
            memory(root, rounds)


if __name__ == "__main__":
    main()
