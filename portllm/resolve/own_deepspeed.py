"""DeepSpeed configurations that a study names, read."""

from typing import Any

from portllm.formats.tensors import read_json
from portllm.resolve.source import Sources, about
from portllm.study.spec import StageResources, Study


def own_configurations(study: Study, sources: Sources) -> dict[str, dict[str, Any]]:
    """What the file of each stage's resources holds, by stage."""
    found = {}
    for stage, resources in study.resources:
        if isinstance(resources, StageResources) and resources.deepspeed is not None:
            field = f"resources.{stage}.deepspeed"
            with about(field):
                found[stage] = read_json(sources.file(resources.deepspeed, field))
    return found
