"""A DeepSpeed configuration of the user's own: resources only. Pure.

Every field is allowed or refused by its name, in the sections too, and its value held to a type: DeepSpeed fails on a
field that it does not know an hour after the plan, or ignores it. What is allowed was run on one and two ranks beside
a training without it: losses to 1e-6 in fp32.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from portllm.errors import SpecError
from portllm.study.complaints import did_you_mean
from portllm.study.resources import Layout


@dataclass(frozen=True)
class Kind:
    """Values that a field may have."""

    words: str
    fits: Callable[[Any], bool]


def _number(value: Any, least: float) -> bool:
    return type(value) in (int, float) and least <= value < float("inf")


FLAG = Kind("true or false", lambda value: type(value) is bool)
SIZE = Kind("a whole number of at least 0", lambda value: _number(value, 0) and value == int(value))
COUNT = Kind("a whole number of at least 1", lambda value: _number(value, 1) and value == int(value))
FACTOR = Kind("a number of at least 1", lambda value: _number(value, 1))
STAGE = Kind("one of 0, 1, 2 and 3", lambda value: type(value) is int and value in range(4))
DEVICE = Kind("cpu or none: nothing is offloaded to a disk", lambda value: value in ("cpu", "none"))
TRUE = Kind("true, as any training here needs it", lambda value: value is True)
FALSE = Kind("false, as any training here needs it", lambda value: value is False)
FP32 = Kind("fp32: fewer bits in a sum of gradients would change numbers", lambda value: value == "fp32")
TEXT = Kind("a text", lambda value: isinstance(value, str))
NAMES = Kind("a list of names", lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value))

OFFLOAD = {"device": DEVICE, "pin_memory": FLAG}
ZERO_3 = {
    "offload_param": OFFLOAD, "sub_group_size": COUNT, "stage3_prefetch_bucket_size": SIZE,
    "stage3_param_persistence_threshold": SIZE, "stage3_model_persistence_threshold": SIZE,
    "stage3_max_live_parameters": SIZE, "stage3_max_reuse_distance": SIZE,
    "stage3_use_all_reduce_for_fetch_params": FLAG, "stage3_allgather_sequential": FLAG,
    "stage3_gather_16bit_weights_on_model_save": FLAG, "zero_hpz_partition_size": COUNT,
    "memory_efficient_linear": FLAG, "override_module_apply": FLAG, "log_trace_cache_warnings": FLAG,
    "leaf_module": {"classes": NAMES, "names": NAMES, "name_suffixes": NAMES},
}  # fmt: skip
"""Fields of `zero_optimization` that stage 3 alone reads."""
RESOURCES = {
    "zero_optimization": {
        "stage": STAGE, "offload_optimizer": OFFLOAD, "contiguous_gradients": FLAG, "reduce_scatter": FLAG,
        "reduce_bucket_size": COUNT, "use_multi_rank_bucket_allreduce": FLAG, "allgather_partitions": FLAG,
        "allgather_bucket_size": SIZE, "overlap_comm": FLAG, "round_robin_gradients": FLAG,
        "parameter_alignment": FLAG, "ignore_unused_parameters": FLAG, "enable_sanity_checks": FLAG, **ZERO_3,
    },
    "zero_allow_untested_optimizer": TRUE, "zero_force_ds_cpu_optimizer": FALSE, "communication_data_type": FP32,
    "prescale_gradients": FLAG, "gradient_predivide_factor": FACTOR, "disable_allgather": FLAG,
    "aio": {
        "block_size": COUNT, "queue_depth": COUNT, "intra_op_parallelism": COUNT, "single_submit": FLAG,
        "overlap_events": FLAG,
    },
    "comms_logger": {"enabled": FLAG, "verbose": FLAG, "prof_all": FLAG, "debug": FLAG, "prof_ops": NAMES},
    "flops_profiler": {
        "enabled": FLAG, "recompute_fwd_factor": Kind("a number of at least 0", lambda value: _number(value, 0)),
        "profile_step": COUNT, "module_depth": Kind("a whole number", lambda value: type(value) is int),
        "top_modules": COUNT, "detailed": FLAG, "output_file": TEXT,
    },
    "wall_clock_breakdown": FLAG, "memory_breakdown": FLAG, "steps_per_print": COUNT, "dump_state": FLAG,
}  # fmt: skip
"""Fields that move rounding, memory or time only, with what they may be; a mapping is a section of its own."""

RECIPE = {
    "train_batch_size": "`batch`", "train_micro_batch_size_per_gpu": "`batch` and `micro_tokens`",
    "gradient_accumulation_steps": "`batch` and `micro_tokens`", "optimizer": "`learning_rate`, `weight_decay`, …",
    "scheduler": "`schedule` and `warmup`", "gradient_clipping": "`clip`", "fp16": "`dtype`", "bf16": "`dtype`",
    "amp": "`dtype`", "torch_autocast": "`dtype`", "data_types": "`dtype`, and gradients are summed accordingly",
    "seed": "`seeds`",
}  # fmt: skip
"""Fields that belong to the recipe, and what the study says instead."""
_QUANTIZED = "moves fewer bits between ranks, which changes numbers"
_DISK = "is for offloading to a disk, and nothing is offloaded there"
_OTHER_STEP = "takes another optimizer than the recipe's"
_CHECKPOINT = "is of DeepSpeed's own checkpoints, and a training here keeps its state in another form"
_IDLE = "is never asked for by a training here"
_OPTIMIZER = "zero_optimization.offload_optimizer"
REFUSED = {
    **{name: f"belongs to the recipe: the study says {instead}" for name, instead in RECIPE.items()},
    "activation_checkpointing": "does nothing here: the study says `gradient_checkpointing` in its resources",
    "compile": _IDLE, "autotuning": _IDLE, "checkpoint": _CHECKPOINT, "aio.use_gds": _DISK,
    "gradient_allreduce_op": "changes the scale of the gradients",
    "zero_optimization.zenflow": "puts part of each optimizer step off, which changes numbers",
    "zero_optimization.zero_quantized_weights": _QUANTIZED, "zero_optimization.zero_quantized_gradients": _QUANTIZED,
    "zero_optimization.zero_quantized_nontrainable_weights": "keeps fewer bits of the weights, which changes numbers",
    "zero_optimization.compute_grad_norm": "is needed: every training clips by that norm and records it",
    "zero_optimization.legacy_stage1": "is gone from DeepSpeed",
    "zero_optimization.stage3_module_granularity_threshold": "fails with the models here (whole layers are no leaves)",
    "zero_optimization.save_muon_momentum_buffer_in_memory": _OTHER_STEP,
    **{f"zero_optimization.{name}": _CHECKPOINT
       for name in ("load_from_fp32_weights", "elastic_checkpoint", "pipeline_loading_checkpoint")},
    "zero_optimization.cpu_offload": "is DeepSpeed's old name: write offload_optimizer: {device: cpu}",
    "zero_optimization.cpu_offload_param": "is DeepSpeed's old name: write offload_param: {device: cpu}",
    "zero_optimization.cpu_offload_use_pin_memory": "is DeepSpeed's old name: write pin_memory where you offload",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save":
        "is DeepSpeed's old name: write stage3_gather_16bit_weights_on_model_save",
    **{f"{_OPTIMIZER}.{name}": _OTHER_STEP for name in ("ratio", "super_offload", "cpuadam_cores_perc")},
    **{f"{_OPTIMIZER}.{name}": _DISK
       for name in ("nvme_path", "buffer_count", "pipeline_read", "pipeline_write", "fast_init")},
    **{f"zero_optimization.offload_param.{name}": _DISK
       for name in ("nvme_path", "buffer_count", "buffer_size", "max_in_cpu")},
}  # fmt: skip
"""Fields that DeepSpeed knows, and why they may not stand here, by their path."""


def laid_over(layout: Layout, own: Mapping[str, Any], where: str) -> Layout:
    """A layout with a user's own configuration.

    Raises SpecError for a field that belongs to the recipe, changes numbers or is unknown, for a value of another
    type, and for fields that contradict each other or the study.
    """
    _require_known(own, RESOURCES, "", where)
    zero = own.get("zero_optimization", {})
    stage = zero.get("stage", layout.zero)
    if layout.zero is not None and stage != layout.zero:
        raise SpecError(f"{where}: zero_optimization.stage is {stage}, and the study says zero: {layout.zero}")
    offload = _offloads(zero, "offload_optimizer", where)
    if layout.offload and offload is False:
        raise SpecError(f"{where}: offload_optimizer is to none, and the study says offload: true")
    _require_works(own, stage, layout.workers, where)
    laid = replace(layout, zero=stage, offload=layout.offload or bool(offload), deepspeed=dict(own))
    if laid.offload and stage == 0:
        raise SpecError(f"{where}: offloading needs a ZeRO stage of at least 1, and the stage is 0: write stage: 1")
    return laid


def _require_known(own: Mapping[str, Any], known: Mapping[str, Any], at: str, where: str) -> None:
    """Raises SpecError for the first field that is refused, unknown or of another type; `at`: its section's path."""
    for name, value in own.items():
        path = f"{at}{name}"
        if path in REFUSED:
            raise SpecError(f"{where}: `{path}` {REFUSED[path]}; leave it out here")
        if name not in known:
            raise SpecError(f"{where}: `{path}` is no resource of DeepSpeed's{did_you_mean(name, sorted(known))}")
        kind = known[name]
        if isinstance(kind, Kind):
            if not kind.fits(value):
                raise SpecError(f"{where}: `{path}` is {value!r}, not {kind.words}")
        elif isinstance(value, Mapping):
            _require_known(value, kind, f"{path}.", where)
        else:
            raise SpecError(f"{where}: `{path}` is {value!r}, not a mapping")


def _offloads(zero: Mapping[str, Any], name: str, where: str) -> bool | None:
    """Whether a section offloads to the host; None where it is not there."""
    if name not in zero:
        return None
    if "device" not in zero[name]:  # DeepSpeed's default is none, which nobody means who writes the section
        raise SpecError(f"{where}: zero_optimization.{name} names no `device`: write device: cpu, or leave it out")
    return bool(zero[name]["device"] == "cpu")


def _require_works(own: Mapping[str, Any], stage: int | None, workers: int, where: str) -> None:
    """Fields that need others. A stage that nobody names is never 3."""
    zero = own.get("zero_optimization", {})
    _offloads(zero, "offload_param", where)
    if stage != 3 and (odd := sorted(ZERO_3.keys() & zero.keys())):
        said = "no stage is named" if stage is None else f"the stage is {stage}"
        raise SpecError(f"{where}: zero_optimization.{odd[0]} is of ZeRO-3 alone, and {said}: leave it out")
    if workers % (group := int(zero.get("zero_hpz_partition_size", 1))):
        raise SpecError(f"{where}: zero_hpz_partition_size {group} does not divide the stage's {workers} workers")
    if zero.get("reduce_scatter", True):
        plain = {"gradient_predivide_factor": 1, "prescale_gradients": False}
        if odd := [name for name, value in plain.items() if own.get(name, value) != value]:
            raise SpecError(f"{where}: {odd[0]} needs zero_optimization.reduce_scatter: false")
