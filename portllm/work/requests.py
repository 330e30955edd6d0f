"""Stage `requests`: a task's documents as token ids for one tokenizer, made once and read by every cell.

    split evaluate   tokens.npy     uint32 [T]     context + continuation of each request, one after another
                     offsets.npy    int64  [R+1]   where each begins
                     answers.npy    int64  [R]     index, within the request, of the first continuation token
                     documents.npy  int64  [R]     position of its document
                     choices.npy    int32  [R]     lm-eval's `Instance.idx`
                     doc_ids.npy    int64  [N]     lm-eval's doc ids
                     doc_hashes.npy S64    [N]     lm-eval's doc hashes
                     prompts.json                  hashes of the documents' folded prompts: what must not reach training
                     meta.json
    split train      tokens.npy, offsets.npy, answers.npy, doc_ids.npy as above, one example each; meta.json

Token ids are those of lm-eval's `HFLM`. They are kept whole: the window they are cut to belongs to the model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from portllm.errors import StageError
from portllm.formats import lmeval
from portllm.study.recipes import Requests
from portllm.work.context import RunContext, Summary
from portllm.work.tokenizing import Encoder, load_tokenizer, window


@dataclass(frozen=True)
class Examples:
    """Training examples, mapped read-only."""

    tokens: np.ndarray
    """uint32 [T]."""
    offsets: np.ndarray
    """int64 [N+1]."""
    answers: np.ndarray
    """int64 [N]: index within the example of its first continuation token."""
    doc_ids: np.ndarray
    """int64 [N]."""
    meta: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.answers)


@dataclass(frozen=True)
class RequestSet:
    """Evaluation requests, mapped read-only. R requests over N documents."""

    tokens: np.ndarray
    offsets: np.ndarray
    answers: np.ndarray
    documents: np.ndarray
    choices: np.ndarray
    doc_ids: np.ndarray
    doc_hashes: np.ndarray
    meta: dict[str, Any]
    """task, output_type, num_fewshot, limit, generation (arguments of generate_until), model_max_length, …"""

    def __len__(self) -> int:
        return len(self.answers)

    def ids(self, request: int) -> np.ndarray:
        """Token ids of one request, context and continuation, int64."""
        return self.tokens[self.offsets[request] : self.offsets[request + 1]].astype(np.int64)


def requests(recipe: Requests, inputs: Mapping[str, Path], out: Path, run: RunContext) -> Summary:
    """Write a task's evaluation requests or training examples below `out`."""
    out.mkdir(parents=True, exist_ok=True)
    task = lmeval.build(source(recipe, inputs))
    tokenizer = load_tokenizer(inputs["tokenizer"], recipe.add_bos)
    encoder = Encoder(tokenizer, recipe.add_bos)
    if recipe.split == "train":
        meta = _write_examples(recipe, task, encoder, inputs, out)
    else:
        meta = _write_requests(recipe, task, encoder, out)
    meta |= {"recipe": asdict(recipe), "task": recipe.task}
    (out / "meta.json").write_text(json.dumps(meta, indent=2), encoding="utf-8")
    summary = {k: v for k, v in meta.items() if isinstance(v, int | str)}
    run.log(" ".join(f"{k}={v}" for k, v in summary.items()))
    return summary


def source(recipe: Requests, inputs: Mapping[str, Path]) -> lmeval.TaskSource:
    """The recipe's task over the data in `inputs`; training prompts are zero-shot."""
    return lmeval.TaskSource(
        name=recipe.task,
        definition=inputs.get("definition"),
        data=inputs.get("data"),
        dataset=recipe.dataset,
        revision=recipe.revision,
        num_fewshot=0 if recipe.split == "train" else recipe.num_fewshot,
    )


def open_requests(path: Path) -> RequestSet:
    """The evaluation requests in a published artifact."""
    names = ("tokens", "offsets", "answers", "documents", "choices", "doc_ids", "doc_hashes")
    return RequestSet(**_map(path, names), meta=json.loads((path / "meta.json").read_bytes()))


def open_examples(path: Path) -> Examples:
    """The training examples in a published artifact."""
    names = ("tokens", "offsets", "answers", "doc_ids")
    return Examples(**_map(path, names), meta=json.loads((path / "meta.json").read_bytes()))


def _map(path: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    return {name: np.load(path / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in names}


def _write_requests(recipe: Requests, task: Any, encoder: Encoder, out: Path) -> dict[str, Any]:
    documents = lmeval.documents(task, recipe.limit)
    per_document = lmeval.instances(task, recipe.limit)
    flat = [instance for instances in per_document for instance in instances]
    kind = lmeval.kind(recipe.task, flat)
    rows = _rows(kind, flat, encoder)
    tokens = _save_rows(rows, out)
    hashes = {lmeval.prompt_hash(prompt) for doc in documents for prompt in lmeval.prompts(task, doc)}
    _save(out, "documents", [n for n, instances in enumerate(per_document) for _ in instances], np.int64)
    _save(out, "choices", [instance.idx for instance in flat], np.int32)
    _save(out, "doc_ids", range(len(documents)), np.int64)
    _save(out, "doc_hashes", [lmeval.doc_hash(doc) for doc in documents], "S64")
    (out / "prompts.json").write_text(json.dumps(sorted(hashes)), encoding="utf-8")
    return {
        "documents": len(documents),
        "requests": len(flat),
        "tokens": tokens,
        "num_fewshot": task.config.num_fewshot,
        "output_type": kind,
        "generation": flat[0].args[1] if kind == "generate_until" else None,
        "model_max_length": window(None, encoder.tokenizer),
    }


def _rows(kind: str, flat: Sequence[Any], encoder: Encoder) -> list[tuple[list[int], int]]:
    """(token ids, index of the first one scored) of each request."""
    if kind == "generate_until":
        return [(ids, len(ids)) for ids in encoder.contexts([instance.args[0] for instance in flat])]
    if kind == "loglikelihood_rolling":
        return encoder.texts([instance.args[0] for instance in flat])
    rows = encoder.pairs([instance.args[:2] for instance in flat])
    for instance, (ids, answer) in zip(flat, rows, strict=True):
        if not 0 < answer < len(ids):
            raise StageError(f"task `{instance.task_name}`, document {instance.doc_id}: choice {instance.idx} has no "
                             f"token of its own with this tokenizer")  # fmt: skip
    return rows


def _write_examples(
    recipe: Requests, task: Any, encoder: Encoder, inputs: Mapping[str, Path], out: Path
) -> dict[str, Any]:
    """The first `examples` of a fixed random order that are no evaluated document's prompt and fit the window.

    The task's own evaluated documents are always screened; roles screen1, … add those of other tasks.
    """
    available = len(lmeval.training_documents(task))
    screened = {lmeval.prompt_hash(prompt) for prompt in lmeval.folded_prompts(task)} | _screens(inputs)
    longest = recipe.window or window(inputs["tokenizer"], encoder.tokenizer)
    wanted = available if recipe.examples is None else recipe.examples
    dropped = {"dropped_leaks": 0, "dropped_long": 0}
    kept: list[tuple[int, list[int], int]] = []
    pairs = lmeval.training_pairs(task, order(available))
    while len(kept) < wanted and (chunk := list(islice(pairs, max(64, min(wanted - len(kept), 4096))))):
        clean = [p for p in chunk if not any(lmeval.prompt_hash(prompt) in screened for prompt in p.prompts)]
        rows = _examples(clean, encoder, ends=task.OUTPUT_TYPE == "generate_until")
        for pair, (ids, answer) in zip(clean, rows, strict=True):
            if len(kept) < wanted and len(ids) <= longest:
                kept.append((pair.doc_id, ids, answer))
            dropped["dropped_long"] += len(ids) > longest
        dropped["dropped_leaks"] += len(chunk) - len(clean)
    if not kept:
        raise StageError(f"task `{recipe.task}`: of {available} training documents none is left: {dropped}")
    tokens = _save_rows([(ids, answer) for _, ids, answer in kept], out)
    _save(out, "doc_ids", [doc_id for doc_id, _, _ in kept], np.int64)
    return {"examples": len(kept), "available": available, "tokens": tokens, "longest": max(len(i) for _, i, _ in kept),
            **dropped}  # fmt: skip


def order(n: int) -> list[int]:
    """A fixed random order of n rows, the same on every machine and Python; one more row moves no other pair."""
    return sorted(range(n), key=lambda i: hashlib.blake2b(str(i).encode(), digest_size=8).digest())


def _screens(inputs: Mapping[str, Path]) -> set[str]:
    paths = [path for role, path in inputs.items() if role.startswith("screen")]
    return {h for path in paths for h in json.loads((path / "prompts.json").read_bytes())}


def _examples(pairs: Sequence[lmeval.Pair], encoder: Encoder, ends: bool) -> Iterator[tuple[list[int], int]]:
    """Token ids and the index of the first one trained on; a generated answer learns to end."""
    eos = [encoder.tokenizer.eos_token_id] if ends and encoder.tokenizer.eos_token_id is not None else []
    for pair, (ids, answer) in zip(pairs, encoder.pairs([p[2:] for p in pairs]), strict=True):
        if not 0 < answer < len(ids):
            raise StageError(f"training document {pair.doc_id}: its answer has no token of its own with this tokenizer")
        yield ids + eos, answer


def _save_rows(rows: Sequence[tuple[list[int], int]], out: Path) -> int:
    _save(out, "tokens", [i for ids, _ in rows for i in ids], np.uint32)
    _save(out, "answers", [answer for _, answer in rows], np.int64)
    offsets = np.cumsum([0] + [len(ids) for ids, _ in rows])
    _save(out, "offsets", offsets, np.int64)
    return int(offsets[-1])


def _save(out: Path, name: str, values: Any, dtype: Any) -> None:
    np.save(out / f"{name}.npy", np.asarray(values, dtype=dtype), allow_pickle=False)
