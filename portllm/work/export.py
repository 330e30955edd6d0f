"""Stage `export`: a version with patches merged, as a complete model directory and where it came from."""

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from portllm.errors import StageError
from portllm.formats.tensors import PROVENANCE, TOKENIZER_FILES
from portllm.study.recipes import Export
from portllm.work.apply import apply
from portllm.work.context import RunContext, Summary
from portllm.work.provenance import of_model, write_json
from portllm.work.source import Terms
from portllm.work.versions import materialise, numbered, version_digest, version_inputs


def export(recipe: Export, inputs: Mapping[str, Path], out: Path, run: RunContext) -> Summary:
    """round(θₜ + Σ λΔθ) into `out`: the patches patch1, patch2, … are added onto the version's bits.

    The version is rounded to its storage dtype first, as everywhere; the patches are then summed onto it in fp32 in
    order and rounded once more. So the tensors equal those `evaluate` scores in mode merged, bit for bit. The tokenizer
    is that of the scores, too: a version may carry an older one.
    """
    root, deltas = version_inputs(inputs)
    patches = numbered(inputs, "patch")
    scales = recipe.scales or (1.0,) * len(patches)
    if len(scales) != len(patches):
        raise StageError(f"recipe holds {len(scales)} scales and the inputs {len(patches)} patches; give one to each")
    version, added = materialise(root, deltas, run.scratch), list(zip(patches, scales, strict=True))
    summary = apply(version, added, out, recipe.dtype)
    _take_tokenizer(inputs["tokenizer"], out)
    summary["sha256"] = version_digest({"root": out})
    facts = of_model(root, added, recipe.dtype, Terms(deltas)) | {"recipe": asdict(recipe)}
    write_json(out / PROVENANCE, facts | {"sha256": summary["sha256"]})
    run.log(f"merged {len(patches)} patches into {summary['touched']} of {summary['tensors']} tensors")
    return summary


def _take_tokenizer(directory: Path, out: Path) -> None:
    for name in TOKENIZER_FILES:
        (out / name).unlink(missing_ok=True)
        if (directory / name).is_file():
            shutil.copyfile(directory / name, out / name)
