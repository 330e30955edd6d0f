"""Recipe and layout → DeepSpeed's configuration: one pure function.

What a number depends on (clipping, dtype) comes from the recipe; the rest from the layout, which moves rounding only.
The optimizer is torch's AdamW, handed to `deepspeed.initialize` by the training loop: an AdamW named here would be
FusedAdam, which DeepSpeed compiles at its first use.
"""

from math import ceil
from typing import Any

from portllm.study.recipes import Optimization
from portllm.study.resources import Layout, Trains, zero_stage

BUCKET = 2**24
"""Elements of a communication bucket: DeepSpeed's own 5e8 would hold 2 GB in fp32 for a model of any size."""


def deepspeed_config(optimization: Optimization, layout: Layout, world: int, trains: Trains) -> dict[str, Any]:
    """DeepSpeed's configuration for `world` ranks. Raises SpecError for a combination that cannot work."""
    stage = zero_stage(layout, world, trains, optimization.dtype)
    own = {name: value for name, value in layout.deepspeed.items() if name != "zero_optimization"}
    return own | {
        # The loop itself says which pass is a step's last: DeepSpeed's own count must be 1.
        "train_micro_batch_size_per_gpu": ceil(optimization.batch / world),
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optimization.clip,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero(stage, layout),
        **({"zero_force_ds_cpu_optimizer": False} if layout.offload else {}),
        **precision(optimization.dtype, stage),
    }


def zero(stage: int, layout: Layout) -> dict[str, Any]:
    section: dict[str, Any] = {"stage": stage}
    if stage > 0:
        section |= {"reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
    if layout.offload:
        section |= {"offload_optimizer": {"device": "cpu"}}
    return section | layout.deepspeed.get("zero_optimization", {}) | {"stage": stage}


def precision(dtype: str, stage: int) -> dict[str, Any]:
    """Compute dtype; DeepSpeed keeps fp32 masters of what trains. ZeRO-0 knows no fp32 sum of bf16 gradients."""
    if dtype == "float16":
        return {"fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 16}}
    if dtype == "bfloat16":
        sums = {"data_types": {"grad_accum_dtype": "fp32"}} if stage > 0 else {}
        return {"bf16": {"enabled": True, "check_grad_overflow": False}, **sums}
    return {}
