"""Stage `export`: a version with patches merged, as a complete model directory and where it came from."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import portllm
from portllm.errors import StageError
from portllm.formats.adapter import read_adapter
from portllm.formats.tensors import PROVENANCE, content_digest, read_json
from portllm.study.recipes import Export
from portllm.work.apply import apply
from portllm.work.context import RunContext, Summary
from portllm.work.versions import materialise, numbered, version_digest, version_inputs


def export(recipe: Export, inputs: Mapping[str, Path], out: Path, run: RunContext) -> Summary:
    """round(θₜ + Σ λΔθ) into `out`: the patches patch1, patch2, … are added onto the version's bits.

    The version is rounded to its storage dtype first, as everywhere; the patches are then summed onto it in fp32 in
    order and rounded once more. So the tensors equal those `evaluate` scores in mode merged, bit for bit.
    """
    root, deltas = version_inputs(inputs)
    patches = numbered(inputs, "patch")
    scales = recipe.scales or (1.0,) * len(patches)
    if len(scales) != len(patches):
        raise StageError(f"recipe holds {len(scales)} scales and the inputs {len(patches)} patches; give one to each")
    version = materialise(root, deltas, run.scratch)
    summary = apply(version, list(zip(patches, scales, strict=True)), out, recipe.dtype)
    summary["sha256"] = version_digest({"root": out})
    origin = _provenance(recipe, deltas, patches, scales) | {"sha256": summary["sha256"]}
    (out / PROVENANCE).write_text(json.dumps(origin, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    run.log(f"merged {len(patches)} patches into {summary['touched']} of {summary['tensors']} tensors")
    return summary


def _provenance(recipe: Export, deltas: list[Path], patches: list[Path], scales: tuple[float, ...]) -> dict[str, Any]:
    """What the weights are made of, by content: directory names mean nothing on another machine."""
    return {
        "portllm": portllm.__version__,
        "recipe": asdict(recipe),
        "deltas": [_origin(path) for path in deltas],
        "patches": [_origin(path) | {"scale": scale} for path, scale in zip(patches, scales, strict=True)],
    }


def _origin(directory: Path) -> dict[str, Any]:
    """An adapter's digest, what it says it was trained on, and its own provenance where it has one."""
    own = directory / PROVENANCE
    return {
        "content": content_digest(directory),
        "base": read_adapter(directory).base,
        "provenance": read_json(own) if own.is_file() else None,
    }
