"""A DeepSpeed configuration of the user's own: resources only. Pure."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from portllm.errors import SpecError
from portllm.study.complaints import did_you_mean
from portllm.study.resources import Layout

RESOURCES = frozenset({
    "zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "activation_checkpointing",
    "communication_data_type", "prescale_gradients", "gradient_predivide_factor", "disable_allgather", "aio",
    "comms_logger", "flops_profiler", "wall_clock_breakdown", "memory_breakdown", "steps_per_print", "dump_state",
    "data_types", "compile",
})  # fmt: skip
"""Top-level fields that move rounding, memory or time only."""
RECIPE = {
    "train_batch_size": "`batch`", "train_micro_batch_size_per_gpu": "`batch` and `micro_tokens`",
    "gradient_accumulation_steps": "`batch` and `micro_tokens`", "optimizer": "`learning_rate`, `weight_decay`, …",
    "scheduler": "`schedule` and `warmup`", "gradient_clipping": "`clip`", "fp16": "`dtype`", "bf16": "`dtype`",
    "amp": "`dtype`", "torch_autocast": "`dtype`", "seed": "`seeds`",
}  # fmt: skip
"""Fields that belong to the recipe, and what the study says instead."""


def laid_over(layout: Layout, own: Mapping[str, Any], where: str) -> Layout:
    """A layout with a user's own configuration. Raises SpecError for what belongs to the recipe, or contradicts it."""
    for name in own:
        if name in RECIPE:
            raise SpecError(
                f"{where}: `{name}` belongs to the recipe: the study says {RECIPE[name]}; leave it out here"
            )
        if name not in RESOURCES:
            raise SpecError(f"{where}: `{name}` is no resource of DeepSpeed's{did_you_mean(name, sorted(RESOURCES))}")
    zero = own.get("zero_optimization", {})
    if not isinstance(zero, Mapping) or "auto" in _values(own):
        raise SpecError(f"{where}: zero_optimization is a mapping, and no value of this file may be `auto`")
    stage, offload = zero.get("stage", layout.zero), zero.get("offload_optimizer")
    if stage is not None and (type(stage) is not int or stage not in range(4)):
        raise SpecError(f"{where}: zero_optimization.stage is {stage!r}; there are 0, 1, 2 and 3")
    if layout.zero is not None and stage != layout.zero:
        raise SpecError(f"{where}: zero_optimization.stage is {stage}, and the study says zero: {layout.zero}")
    if isinstance(offload, Mapping) and offload.get("device", "cpu") not in ("cpu", "none"):
        raise SpecError(f"{where}: offload_optimizer to {offload['device']}: only to the cpu")
    offloads = isinstance(offload, Mapping) and offload.get("device", "cpu") == "cpu"
    return replace(layout, zero=stage, offload=layout.offload or offloads, deepspeed=dict(own))


def _values(value: Any) -> list[Any]:
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else None
    return [value] if inner is None else [found for part in inner for found in _values(part)]
