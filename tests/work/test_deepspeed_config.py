"""Recipe and layout → DeepSpeed's configuration."""

from dataclasses import replace
from typing import Any

import pytest

from portllm.errors import SpecError
from portllm.study.own_deepspeed import laid_over
from portllm.study.recipes import Optimization
from portllm.study.resources import Layout
from portllm.work.deepspeed_config import BUCKET, deepspeed_config, zero_stage

OPTIMIZATION = Optimization(learning_rate=1e-3, batch=32, seed=1)
BUCKETS = {"reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}


@pytest.mark.parametrize(
    ("optimization", "layout", "world", "trains", "expected"),
    [
        (
            OPTIMIZATION, Layout(), 1, "lora",
            {"train_micro_batch_size_per_gpu": 32, "gradient_accumulation_steps": 1, "gradient_clipping": 1.0,
             "zero_allow_untested_optimizer": True, "zero_optimization": {"stage": 0}},
        ),
        (
            replace(OPTIMIZATION, dtype="bfloat16", clip=0.5), Layout(micro_tokens=300), 4, "lora",
            {"train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 1, "gradient_clipping": 0.5,
             "zero_allow_untested_optimizer": True, "zero_optimization": {"stage": 2, **BUCKETS},
             "bf16": {"enabled": True, "check_grad_overflow": False}, "data_types": {"grad_accum_dtype": "fp32"}},
        ),
        (
            replace(OPTIMIZATION, dtype="float16"), Layout(offload=True), 2, "full",
            {"train_micro_batch_size_per_gpu": 16, "gradient_accumulation_steps": 1, "gradient_clipping": 1.0,
             "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
             "zero_optimization": {"stage": 1, **BUCKETS, "offload_optimizer": {"device": "cpu"}},
             "fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 16}},
        ),
        (
            OPTIMIZATION,
            laid_over(Layout(), {"zero_optimization": {"stage": 2, "overlap_comm": True}, "aio": {}}, "f"), 2, "full",
            {"train_micro_batch_size_per_gpu": 16, "gradient_accumulation_steps": 1, "gradient_clipping": 1.0,
             "zero_allow_untested_optimizer": True, "aio": {},
             "zero_optimization": {"stage": 2, **BUCKETS, "overlap_comm": True}},
        ),
    ],
)  # fmt: skip
def test_golden_configurations(
    optimization: Optimization, layout: Layout, world: int, trains: Any, expected: dict[str, Any]
) -> None:
    assert deepspeed_config(optimization, layout, world, trains) == expected


def test_zero_defaults_to_0_alone_and_with_several_workers_to_2_for_lora_and_1_for_full_weights() -> None:
    assert [zero_stage(Layout(), 1, t) for t in ("lora", "full")] == [0, 0]
    assert [zero_stage(Layout(), 2, t) for t in ("lora", "full")] == [2, 1]
    assert zero_stage(Layout(zero=3), 2, "full") == 3


@pytest.mark.parametrize(
    ("layout", "trains", "message"),
    [
        (Layout(zero=3), "lora", "ZeRO-3 with LoRA"),
        (Layout(zero=4), "full", "no ZeRO stage"),
        (Layout(zero=0, offload=True), "full", "offload"),
    ],
)
def test_what_cannot_work_is_refused_with_its_mend(layout: Layout, trains: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        deepspeed_config(OPTIMIZATION, layout, 2, trains)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"optimizer": {"type": "Adam"}}, "my.json: `optimizer` belongs to the recipe: the study says `learning_rate`"),
        ({"train_batch_size": 64}, "`train_batch_size` belongs to the recipe: the study says `batch`"),
        ({"bf16": {"enabled": True}}, "the study says `dtype`"),
        ({"zero_optimisation": {}}, "no resource of DeepSpeed's; did you mean `zero_optimization`"),
        ({"zero_optimization": {"stage": 3}}, "stage is 3, and the study says zero: 1"),
        ({"zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"}}, "may be `auto`"),
        ({"zero_optimization": {"stage": 5}}, "stage is 5; there are 0, 1, 2 and 3"),
        ({"zero_optimization": {"stage": "2"}}, "stage is .2.; there are 0, 1, 2 and 3"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "only to the cpu"),
        ({"zero_optimization": 2}, "is a mapping"),
    ],
)  # fmt: skip
def test_a_configuration_of_the_user_s_own_may_set_resources_only(own: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        laid_over(Layout(zero=1), own, "resources.update.deepspeed: my.json")


def test_offloading_in_a_configuration_of_the_user_s_own_is_seen_by_the_plan() -> None:
    layout = laid_over(Layout(), {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "f")
    assert (layout.zero, layout.offload) == (2, True)
    assert deepspeed_config(OPTIMIZATION, layout, 2, "full")["zero_force_ds_cpu_optimizer"] is False


def test_the_module_is_imported_without_torch() -> None:
    import subprocess
    import sys

    code = "import sys, portllm.work.deepspeed_config; assert not {'torch', 'deepspeed'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
