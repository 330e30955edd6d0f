"""θₜ → Δθ: a LoRA patch trained on a task's examples, loss on the continuation only.

A patch is a plain PEFT adapter directory; `provenance.json` beside it says what made it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from portllm.errors import StageError
from portllm.formats.tensors import sha256
from portllm.study.keys import canonical
from portllm.study.recipes import Finetune
from portllm.work.batches import Batch, Sequences, examples, finetune_batches
from portllm.work.context import RunContext, Summary
from portllm.work.lora import attach, go_on, private_copy, require_applicable, save_adapter
from portllm.work.provenance import licence, seal_patch
from portllm.work.requests import open_examples
from portllm.work.training import train
from portllm.work.versions import identify

METRICS = ("steps", "tokens", "loss_first", "loss_last")


def finetune(recipe: Finetune, inputs: Mapping[str, Path], out: Path, run: RunContext) -> Summary:
    """Stage `finetune`: the patch in `out`. StageError for targets that match nothing, and for a bad loss or tensor."""
    resident = run.open(inputs, recipe.optimization.dtype)
    model = private_copy(resident.model, "lora")
    data = read(inputs["examples"], model)
    adapted = (
        go_on(model, inputs["patch1"]) if "patch1" in inputs else attach(model, recipe.lora, recipe.optimization.seed)
    )
    require_applicable(adapted, resident)
    ledger = train(model, data, plan(recipe, data), recipe.optimization, "lora", run, out)
    if run.rank == 0:
        save_adapter(adapted, out)
        seal_patch(out, facts(recipe, inputs, ledger, resident.path, run))
    return ledger


def read(path: Path, model: Any) -> Sequences:
    """The examples, no longer than the model reads."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    found = open_examples(path)
    if len(found.answers) == 0:
        raise StageError("the task has no training example left: raise `examples`, or look at what was screened out")
    return examples(found.tokens, found.offsets, found.answers, found.doc_ids, limit)


def plan(recipe: Finetune, data: Sequences) -> list[Batch]:
    """Global batches; epochs are rounded to whole optimizer steps."""
    batch, seed = recipe.optimization.batch, recipe.optimization.seed
    steps = recipe.steps or (recipe.epochs or 1.0) * len(data) / batch
    return finetune_batches(data.lengths, batch, max(1, round(steps * recipe.share)), seed)


def facts(recipe: Finetune, inputs: Mapping[str, Path], ledger: Summary, model: Path, run: RunContext) -> Summary:
    """What the provenance says of this patch."""
    digest, lineage = identify(inputs, run.scratch)
    task = open_examples(inputs["examples"]).meta.get("task")
    return {
        "step": dict(run.about),
        "source": {"sha256": digest, "lineage": lineage},
        "data": {"task": task, "examples": ledger["examples"], "sha256": sha256(inputs["examples"] / "tokens.npy")},
        "recipe": canonical(recipe),
        "metrics": {name: ledger[name] for name in METRICS if name in ledger},
        "licence": licence(model),
    }
