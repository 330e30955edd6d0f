"""A corpus: documents from any origin (`formats.text`), tokenised once, in a seeded order, memory-mapped.

    documents → without excluded rows → tokens in row order (scratch) → tokens in the final order (published)

Both passes are blockwise: a corpus larger than memory works; only the offsets are held.

A document ends with EOS, and begins with BOS where the tokenizer has a text begin so: each is read as if it stood alone
(`work/batches.py`), and a model that always saw BOS first is lost without it (Gemma 3 270M on instructions: 5.8 nats a
token without, 4.1 with; 4.2 and 3.7 where a document also sees those before it).
"""

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from portllm.errors import StageError
from portllm.formats import lmeval
from portllm.formats.text import documents
from portllm.study.recipes import Corpus
from portllm.work.context import RunContext, Summary

DOCUMENTS = 1000
"""Documents tokenised at once."""
COPIED = 4096
"""Documents moved at once into their final order."""

Numbered = Iterable[tuple[int, str]]
"""Documents with their row numbers."""


def corpus(recipe: Corpus, inputs: Mapping[str, Path], out: Path, run: RunContext) -> Summary:
    """Stage `corpus`: `tokens.npy` (uint32), `offsets.npy` (int64 [documents + 1]), `rows.npy` (int64) and `meta.json`.

    Raises StageError for a corpus without a token.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(inputs["tokenizer"])
    dropped: list[int] = []
    prompts = screened([path for role, path in sorted(inputs.items()) if role.startswith("screen")])
    numbered = enumerate(documents(recipe.text, inputs.get("source")))
    kept = without(numbered, frozenset(recipe.excluded), prompts, dropped)
    meta = tokenise(kept, tokenizer, recipe.text.seed, out, run.scratch) | {"dropped": len(dropped)}
    (out / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    return meta


def screened(requests: Iterable[Path]) -> frozenset[str]:
    """Hashes of the folded prompts of evaluated documents, from outputs of `requests`."""
    return frozenset(h for path in requests for h in json.loads((path / "prompts.json").read_bytes()))


def without(numbered: Numbered, excluded: frozenset[int], prompts: frozenset[str], dropped: list[int]) -> Numbered:
    """The documents that may be trained on; row numbers of the others go to `dropped`."""
    for row, document in numbered:
        if row in excluded or (prompts and lmeval.prompt_hash(document) in prompts):
            dropped.append(row)
        elif document:
            yield row, document


def tokenise(numbered: Numbered, tokenizer: Any, seed: int, out: Path, scratch: Path) -> Summary:
    """Writes the documents' tokens, parted by EOS (and BOS), in an order shuffled by the seed; returns counts."""
    if tokenizer.eos_token_id is None:
        raise StageError("the tokenizer has no EOS token, and documents need one between them: set `eos_token` in it")
    before, after = opening(tokenizer), [tokenizer.eos_token_id]
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=scratch) as file:
        lengths: list[int] = []
        numbers: list[int] = []
        for block in blocks(numbered):
            tokens = tokenizer([text for _, text in block], add_special_tokens=False, verbose=False)["input_ids"]
            tokens = [(ids if ids[: len(before)] == before else before + ids) + after for ids in tokens]
            lengths += map(len, tokens)
            numbers += [row for row, _ in block]
            file.write(np.array([t for ids in tokens for t in ids], np.uint32).tobytes())
        if not numbers:
            raise StageError("the corpus is empty: no document is left to train on")
        file.flush()
        flat = np.memmap(file, np.uint32, mode="r")
        shuffle(flat, np.array(lengths, np.int64), np.array(numbers, np.int64), seed, out)
    return {"documents": len(numbers), "tokens": sum(lengths), "eos": tokenizer.eos_token_id}


def opening(tokenizer: Any) -> list[int]:
    """What the tokenizer itself puts before a text: BOS or nothing. A document may bring it already."""
    before = [tokenizer.bos_token_id]
    return before if tokenizer("a")["input_ids"][:1] == before else []


def blocks(numbered: Numbered) -> Iterator[list[tuple[int, str]]]:
    rest = iter(numbered)
    while block := list(islice(rest, DOCUMENTS)):
        yield block


def shuffle(flat: np.ndarray, lengths: np.ndarray, numbers: np.ndarray, seed: int, out: Path) -> None:
    """Writes `tokens.npy`, `offsets.npy` and `rows.npy` in the seeded order."""
    order = np.random.default_rng(seed).permutation(len(lengths))
    begins, offsets = ends(lengths), ends(lengths[order])
    tokens = np.lib.format.open_memmap(out / "tokens.npy", mode="w+", dtype=np.uint32, shape=(int(offsets[-1]),))
    for first in range(0, len(order), COPIED):
        block = order[first : first + COPIED]
        span = slice(offsets[first], offsets[first + len(block)])
        tokens[span] = np.concatenate([flat[begins[i] : begins[i + 1]] for i in block])
    tokens.flush()
    np.save(out / "offsets.npy", offsets)
    np.save(out / "rows.npy", numbers[order])


def ends(lengths: np.ndarray) -> np.ndarray:
    """Offsets of consecutive spans: int64 [n + 1]."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
