"""θₜ → θₜ₊₁: continued pretraining on a slice of a corpus, by LoRA (kept as its delta) or on full weights.

The slice is packed (`batches.packed`), its documents side by side. Beside the delta or the model lies `version.json`,
with the sha256 of the new version's materialised tensors: every node that rebuilds the version checks itself against
it.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from portllm.errors import StageError
from portllm.formats.tensors import CONFIGS, TOKENIZER_FILES
from portllm.study.recipes import Lora, Update
from portllm.work import versions
from portllm.work.batches import Sequences, mixed, packed, update_batches
from portllm.work.context import RunContext, Summary
from portllm.work.lora import attach, check_saved, private_copy, require_applicable, save_adapter
from portllm.work.provenance import write_json
from portllm.work.training import Whole, train
from portllm.work.versions import numbered

SHARD = "2GB"
"""Largest weight file: versions are read and applied shard by shard."""


def update(recipe: Update, inputs: Mapping[str, Path], out: Path, run: RunContext) -> Summary:
    """Stage `update`: a PEFT adapter (method lora) or a complete model directory (full) in `out`, and `version.json`.

    Raises StageError for a corpus that is too short or a sequence longer than the model reads.
    """
    data = read(recipe, inputs)
    resident = run.open(inputs, recipe.optimization.dtype)
    check_length(resident.model, recipe.sequence_length)
    model = private_copy(resident.model, recipe.method)
    adapted = attach(model, shape(recipe), recipe.optimization.seed) if recipe.method == "lora" else None
    if adapted is not None:
        require_applicable(adapted, resident)
    batches = update_batches(len(data), recipe.optimization.batch, recipe.optimization.seed)
    stored = resident if adapted is None else Whole()
    ledger = train(model, data, batches, recipe.optimization, recipe.method, run, out, stored)
    if run.rank == 0:
        if adapted is None:
            save_model(model, resident.path, out)
        else:
            save_adapter(adapted, out)
        write_version(recipe, inputs, out, resident.storage, run.scratch)
    return ledger


def read(recipe: Update, inputs: Mapping[str, Path]) -> Sequences:
    """Packed sequences of the slice and of those replayed; which comes when is the seed's choice."""
    own = packed(inputs["corpus"], recipe.start, recipe.tokens, recipe.sequence_length)
    if not recipe.replay:
        return own
    parts = {"corpus": own}
    for number, (path, part) in enumerate(zip(numbered(inputs, "replay"), recipe.replay, strict=True), 1):
        parts[f"replay{number}"] = packed(path, part.start, part.tokens, recipe.sequence_length)
    return mixed(parts)


def shape(recipe: Update) -> Lora:
    if recipe.lora is None:
        raise StageError("an update by LoRA needs its shape: `rank` and `alpha`")
    return recipe.lora


def check_length(model: Any, length: int) -> None:
    """Refuses sequences longer than the model's positions."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and length > longest:
        raise StageError(f"sequence_length {length} is more than the model reads ({longest} tokens): set that or less")


def save_model(model: Any, root: Path, out: Path) -> None:
    """A complete model directory: weights in shards, configuration and tokenizer as they are in `root`."""
    model.save_pretrained(out, max_shard_size=SHARD)
    for name in (*CONFIGS, *TOKENIZER_FILES):
        if (root / name).is_file():
            shutil.copyfile(root / name, out / name)
    for file in out.glob("*.safetensors"):
        check_saved(file)


def write_version(recipe: Update, inputs: Mapping[str, Path], out: Path, storage: torch.dtype, scratch: Path) -> None:
    """`version.json`: how the version was made, its storage dtype, the sha256 of its materialised tensors and of each
    version before it, θ₀ first."""
    before, lineage = versions.identify(inputs, scratch)
    facts = {
        "method": recipe.method,
        "storage": str(storage).removeprefix("torch."),
        "sha256": versions.version_digest(roles_after(recipe, inputs, out)),
        "lineage": [*lineage, before],
    }
    write_json(out / versions.CLAIM, facts)


def roles_after(recipe: Update, inputs: Mapping[str, Path], out: Path) -> dict[str, Path]:
    """Roles root, delta1, … of the new version."""
    if recipe.method == "full":
        return {"root": out}
    before = {role: path for role, path in inputs.items() if role == "root" or role.startswith("delta")}
    return before | {f"delta{len(before)}": out}
