"""`make parity`: every score, choice, metric and generated text of `portllm evaluate` beside lm-eval's HFLM, fp32.

Whole validation sets of the multiple-choice tasks; gsm8k's texts on 200 documents with 0 and 5 examples. An item whose
two best choices HFLM itself puts within 2e-4 of each other may be chosen either way: such items are listed apart, and
at most one in a thousand of the whole run may be so. A metric may differ only where such an item was chosen otherwise,
an accuracy by no more than those items are.
Ends with 1 where anything else differs.

Over a vocabulary as large as Gemma's (262k) torch's fp32 log-softmax, which HFLM takes by default, is itself wrong by
1e-4 a token: sums of that many small terms lose them. There HFLM is asked for its float64 one (`softmax_dtype`).
"""

import argparse
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from portllm.formats import lmeval
from portllm.work.cells import Asked, score

DATA = Path(__file__).parents[3] / "shared" / "data"
CHOICES = ("sst2", "rte", "mrpc", "wnli", "boolq", "winogrande")
TIE, WITHIN = 2e-4, 1e-4
LARGE = 100_000
"""Entries of a vocabulary from which on an fp32 log-softmax is not exact to 1e-4."""
SHAPE = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 1024}  # fmt: skip


@dataclass(frozen=True)
class Found:
    """One task of one model."""

    documents: int
    largest: float
    """Largest difference of a log-likelihood; for generated text, how many texts differ."""
    ties: tuple[int, ...]
    """Documents whose two best choices HFLM puts as good as level."""
    other: int
    """Items chosen differently that are no tie, or differing texts."""
    metrics: bool
    """The same, or moved by near ties that were chosen differently."""

    @property
    def holds(self) -> bool:
        return self.other == 0 and self.metrics and self.largest <= WITHIN


def random_configs(words: int, **ends: int | None) -> dict[str, Any]:
    """Several families at toy size, by name."""
    size = {"vocab_size": words, **ends}
    return {
        "random Mistral": transformers.MistralConfig(**SHAPE, **size, sliding_window=256),
        "random Llama": transformers.LlamaConfig(**SHAPE, **size),
        "random Gemma 2": transformers.Gemma2Config(**SHAPE, **size, sliding_window=256),
        "random GPT-2": transformers.GPT2Config(**size, n_embd=64, n_layer=3, n_head=4, n_positions=1024),
    }


def models(root: Path) -> Iterator[tuple[str, Path]]:
    """The small real models, and random ones with home-12M's tokenizer, made below `root`."""
    yield from ((name, DATA / "models" / name) for name in ("stories260K", "home-12M"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(DATA / "models" / "home-12M")
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    for name, config in random_configs(len(tokenizer), **ends).items():
        torch.manual_seed(0)
        where = root / name.replace(" ", "-")
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(where)
        tokenizer.save_pretrained(where)
        yield name, where


def hflm(model: Path, task: str, limit: int | None, shots: int | None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(results, samples) of lm-eval's own evaluation."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    words = transformers.AutoConfig.from_pretrained(model).get_text_config().vocab_size
    exact = "float64" if words > LARGE else None
    size = 32 if task not in CHOICES else 1 if words > LARGE else 8  # HFLM's float64 logits of 8 BoolQ rows are 12 GB
    lm = HFLM(pretrained=str(model), device="cpu", dtype="float32", batch_size=size, softmax_dtype=exact)
    built = lmeval.build(lmeval.TaskSource(task, data=DATA / "tasks" / task, num_fewshot=shots))
    found = lm_eval.evaluate(lm, {task: built}, limit=limit, log_samples=True, bootstrap_iters=0)
    return found["results"][task], found["samples"][task]


def compare(model: Path, task: str, limit: int | None, shots: int | None) -> Found:
    ours = next(score(model, [], Asked([task], DATA / "tasks", num_fewshot=shots, limit=limit)))
    results, samples = hflm(model, task, limit, shots)
    items = ours.items.to_pylist()
    assert [item["doc_hash"] for item in items] == [sample["doc_hash"] for sample in samples]
    pairs = list(zip(items, samples, strict=True))
    if items[0]["text"] is not None:
        differ = sum(item["text"] != sample["resps"][0][0] for item, sample in pairs)
        return Found(len(items), 0.0, (), differ, _metrics_hold(ours.summary["metrics"], results, 0.0))
    largest, ties, other, flipped = 0.0, list[int](), 0, 0
    for item, sample in pairs:
        theirs = np.array([response[0][0] for response in sample["resps"]])
        largest = max(largest, float(np.abs(np.array(item["choice_loglikelihoods"]) - theirs).max()))
        best = np.sort(theirs)
        near = best[-1] - best[-2] < TIE
        differs = int(item["prediction"]) != int(theirs.argmax())
        ties += [item["doc_id"]] * int(near)
        flipped, other = flipped + (differs and near), other + (differs and not near)
    share = flipped / len(items)
    return Found(len(items), largest, tuple(ties), other, _metrics_hold(ours.summary["metrics"], results, share))


def _metrics_hold(metrics: list[dict[str, Any]], theirs: dict[str, Any], flipped: float) -> bool:
    """Whether they are HFLM's, but for the share of the documents that near ties have flipped."""
    for metric in metrics:
        gap = abs(metric["value"] - theirs[f"{metric['metric']},{metric['filter']}"])
        if gap > 1e-9 + (flipped if metric["metric"] == "acc" or not flipped else 1.0):
            return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gemma", type=Path, help="Gemma 3 270M as a model directory: 500 documents a task")
    parser.add_argument("--limit", type=int, help="documents a task; default: all")
    parser.add_argument("--models", default="", help="substring of the models' names")
    parser.add_argument("--tasks", default=",".join((*CHOICES, "gsm8k")))
    arguments = parser.parse_args()
    asked = arguments.tasks.split(",")
    logging.disable(logging.WARNING)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    print("| model | task | documents | largest difference | near ties | differ | metrics |")
    print("|---|---|---|---|---|---|---|", flush=True)
    holds, documents, tied = True, 0, dict[str, tuple[int, ...]]()
    with tempfile.TemporaryDirectory() as folder:
        named = [*models(Path(folder)), *([("Gemma 3 270M", arguments.gemma)] if arguments.gemma else [])]
        for name, model in named:
            limit = 500 if name.startswith("Gemma 3") else arguments.limit
            cases = [(task, limit, None) for task in CHOICES] + [("gsm8k", min(200, limit or 200), n) for n in (0, 5)]
            for task, count, shots in cases if arguments.models in name else []:
                if task not in asked:
                    continue
                found = compare(model, task, count, shots)
                holds &= found.holds
                label = f"{task}, {shots} shots" if shots is not None else task
                documents += found.documents if task in CHOICES else 0  # a text ties with nothing
                tied |= {f"{name}, {label}": found.ties} if found.ties else {}
                print(f"| {name} | {label} | {found.documents} | {found.largest:.0e} | {len(found.ties)} | "
                      f"{found.other} | {'the same' if found.metrics else 'differ'} |", flush=True)  # fmt: skip
    ties = sum(map(len, tied.values()))
    print(f"\n{ties} near ties of {documents:,} documents, {ties / max(documents, 1):.2%}")
    for where, found_there in tied.items():
        print(f"  {where}: documents {', '.join(map(str, found_there))}")
    sys.exit(0 if holds and ties <= documents / 1000 else 1)


if __name__ == "__main__":
    main()
