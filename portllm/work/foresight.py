"""Stage `diagnose`: what the weights alone say of porting one patch onto one version (`diagnosis.json`)."""

from collections.abc import Mapping
from pathlib import Path

from portllm.study.recipes import Diagnose
from portllm.work import diagnose as weights
from portllm.work.context import RunContext, Summary
from portllm.work.provenance import write_json
from portllm.work.source import Source, Terms
from portllm.work.versions import version_inputs


def diagnose(recipe: Diagnose, inputs: Mapping[str, Path], out: Path, run: RunContext) -> Summary:
    """The patch (`patch1`) against the version, its update from θ₀ (`zero`), and the version's own patch (`other`).

    The version is read as it is kept, root and deltas, tensor by tensor; no model is loaded.
    """
    root, deltas = version_inputs(inputs)
    version = Source.read(root, [], Terms(tuple(deltas)))
    found = weights.diagnose(inputs["patch1"], version, Source.read(inputs["zero"], []), inputs.get("other"))
    write_json(out / "diagnosis.json", found)
    return dict(found["total"])
