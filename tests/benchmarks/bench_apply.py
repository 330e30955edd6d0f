"""`make bench-apply`: a patch applied by copying, by portllm and by PEFT, side by side in one run.

A checkpoint of Llama's shapes with random bfloat16 weights, and random adapters. Every way runs in a process of its
own, its output removed before the next one; the ways take turns, and the table holds medians over the rounds.
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

TINYLLAMA = {"hidden": 2048, "inner": 5632, "layers": 22, "heads": 32, "kv_heads": 4, "vocabulary": 32000}
"""1.1B parameters: 2.2 GB in bfloat16."""
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
merged = PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload()
merged.save_pretrained(sys.argv[3], max_shard_size="1GB")
"""


def shapes(size: dict[str, int]) -> dict[str, tuple[int, int]]:
    """(out, in) of a block's linear modules."""
    hidden, inner = size["hidden"], size["inner"]
    narrow = hidden // size["heads"] * size["kv_heads"]
    block = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (narrow, hidden)}
    block |= {"self_attn.v_proj": (narrow, hidden), "self_attn.o_proj": (hidden, hidden)}
    return block | {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}


def make_model(out: Path, size: dict[str, int], shards: int = 3) -> Path:
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
    torch.manual_seed(0)
    where, ordered = {}, sorted(names)
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        mine = ordered[shard * len(ordered) // shards : (shard + 1) * len(ordered) // shards]
        save_file({n: (torch.randn(names[n]) * 0.02).bfloat16() for n in mine}, out / file, {"format": "pt"})
        where |= dict.fromkeys(mine, file)
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return out


def make_patch(out: Path, size: dict[str, int], targets: list[str], rank: int = 8) -> Path:
    import torch
    from safetensors.torch import save_file

    out.mkdir(parents=True)
    tensors = {}
    for layer in range(size["layers"]):
        for name, (rows, columns) in shapes(size).items():
            if name.rpartition(".")[2] in targets:
                key = f"base_model.model.model.layers.{layer}.{name}"
                tensors[f"{key}.lora_A.weight"] = torch.randn(rank, columns) * 0.02
                tensors[f"{key}.lora_B.weight"] = torch.randn(rows, rank) * 0.02
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


def measure(command: list[str], out: Path) -> tuple[float, float]:
    """(seconds, peak resident GB) of a command in a process of its own, or of a shell line with its children."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begun
    if status:
        raise SystemExit(f"{command}: {process.stderr.read().decode() if process.stderr else ''}")
    return seconds, usage.ru_maxrss / 1e6


def ways(model: Path, patch: Path, out: Path) -> dict[str, list[str]]:
    portllm = [sys.executable, "-m", "portllm", "apply"]
    ours = [*portllm, "--model", str(model), "--patch", str(patch), "--out", str(out)]
    return {
        "cp -r": ["cp", "-r", str(model), str(out)],
        "cp -r, sync": ["sh", "-c", f"cp -r {model} {out} && sync -f {out}/config.json"],
        "portllm apply": ours,
        "portllm apply --durable": [*ours, "--durable"],
        "PEFT merge, save": [sys.executable, "-c", PEFT, str(model), str(patch), str(out)],
    }


def table(title: str, found: dict[str, list[tuple[float, float]]]) -> str:
    base = statistics.median(s for s, _ in found["cp -r, sync"])
    lines = [f"| {title} | seconds | of the durable copy | peak GB |", "|---|---|---|---|"]
    for way, runs in found.items():
        seconds, peak = statistics.median(s for s, _ in runs), max(p for _, p in runs)
        lines.append(f"| {way} | {seconds:.2f} | {seconds / base:.2f} | {peak:.2f} |")
    return "\n".join(lines)


def run(commands: dict[str, list[str]], out: Path, rounds: int) -> dict[str, list[tuple[float, float]]]:
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in commands}
    for _ in range(rounds):
        for way, command in commands.items():
            found[way].append(measure(command, out))
    shutil.rmtree(out, ignore_errors=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=TINYLLAMA["layers"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="where about 7 GB are free; default: the temporary directory")
    arguments = parser.parse_args()
    size = TINYLLAMA | {"layers": arguments.layers}
    with tempfile.TemporaryDirectory(dir=arguments.directory) as folder:
        root = Path(folder)
        apart(make_model, root / "model", size)
        every = [name.rpartition(".")[2] for name in shapes(size)]
        for title, targets in (("r = 8 on q, k, v, o", ATTENTION), ("r = 8 on all linear", every)):
            patch = root / f"patch{len(targets)}"
            apart(make_patch, patch, size, targets)
            print(
                table(title, run(ways(root / "model", patch, root / "out"), root / "out", arguments.rounds)),
                "\n",
                flush=True,
            )


if __name__ == "__main__":
    main()
