"""A toy world on disk in a second: a Llama of 20k parameters, two lm-eval tasks, a corpus, adapters by PEFT."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import yaml

WORDS = [
    *("good", "bad", "nice", "poor", "it", "was", "the", "film", "a", "very"),
    *("question", ":", "positive", "or", "negative", "?", "answer", "yes", "no", "red", "blue"),
]
"""The first ten make sentences."""


def write_model(path: Path, seed: int = 0, hidden: int = 32, layers: int = 2) -> Path:
    """A random Llama with a word tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(path)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def write_patch(path: Path, model: Path, seed: int = 0, rank: int = 2) -> Path:
    """A random LoRA adapter of a model, written by PEFT."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(model)
    adapted = get_peft_model(base, LoraConfig(r=rank, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    adapted.save_pretrained(path)
    return path


def write_tasks(root: Path, names: tuple[str, ...] = ("mood", "tone"), train: int = 48, validation: int = 20) -> Path:
    """lm-eval tasks of the user's own: YAML in root/tasks, data in root/data/<task>."""
    (root / "tasks").mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(names):
        write_rows(root / "data" / name, random.Random(seed), train, validation)
        (root / "tasks" / f"{name}.yaml").write_text(
            yaml.safe_dump(
                {
                    "task": name,
                    "dataset_path": "parquet",
                    "output_type": "multiple_choice",
                    "training_split": "train",
                    "validation_split": "validation",
                    "doc_to_text": f"{{{{sentence}}}} question : positive or negative {'? ' * (seed + 1)}answer :",
                    "doc_to_target": "label",
                    "doc_to_choice": ["bad", "good"],
                    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
                }
            )
        )
    return root


def write_rows(directory: Path, rng: random.Random, train: int, validation: int) -> None:
    """Sentences of eight words, no two alike; the label is whether `good` or `nice` is among them."""
    directory.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    while len(seen) < train + validation:
        seen.add(" ".join(rng.choice(WORDS[:10]) for _ in range(8)))
    rows = [{"sentence": s, "label": int("good" in s or "nice" in s), "idx": i} for i, s in enumerate(sorted(seen))]
    rng.shuffle(rows)
    write_parquet(directory / "train.parquet", rows[:train])
    write_parquet(directory / "validation.parquet", rows[train:])


def write_parquet(path: Path, rows: list[dict]) -> None:
    pa.parquet.write_table(pa.Table.from_pylist(rows), path)


def write_corpus(path: Path, documents: int = 200, extra: tuple[str, ...] = ()) -> Path:
    """Random sentences, one a line."""
    rng = random.Random(7)
    lines = [" ".join(rng.choice(WORDS) for _ in range(20)) for _ in range(documents)]
    path.write_text("\n".join([*lines, *extra]) + "\n")
    return path


STUDY = """
name: toy
data_root: data
models: {m: {path: model}}
corpora: {c: {path: corpus.txt}}
lineages:
  soft:
    model: m
    updates: [{corpus: c, method: lora, rank: 2, tokens: 256, sequence_length: 32, batch: 4, learning_rate: 1e-3}]
tasks: [{task: mood, include_path: tasks}]
finetune: {rank: 2, learning_rate: 1e-2, steps: 4, batch: 8}
"""


TWO_LINEAGES = STUDY.replace(
    "tasks:",
    """  hard:
    model: m
    updates: [{corpus: c, method: full, tokens: 256, sequence_length: 32, batch: 4, learning_rate: 1e-3}]
export: [{lineage: hard, t: 1, arm: port}]
diagnose: true
tasks:""",
)


def write_world(root: Path, study: str = STUDY) -> Path:
    """Everything of a toy study below a directory; returns the study file."""
    root.mkdir(parents=True, exist_ok=True)
    write_model(root / "model")
    write_tasks(root)
    write_corpus(root / "corpus.txt")
    (root / "study.yaml").write_text(study)
    return root / "study.yaml"


def portllm(*arguments, code=0, **environment):
    """Run a command; returns its standard output, or its standard error where `code` is not 0."""
    found = subprocess.run(
        [sys.executable, "-m", "portllm", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=300,
    )
    assert found.returncode == code, f"exit code {found.returncode}\n{found.stdout[-3000:]}\n{found.stderr[-6000:]}"
    return found.stdout if code == 0 else found.stderr
