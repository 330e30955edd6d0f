"""Recipe and layout → DeepSpeed's configuration."""

from dataclasses import replace
from typing import Any

import pytest

from portllm.errors import SpecError
from portllm.study.own_deepspeed import REFUSED, RESOURCES, laid_over
from portllm.study.recipes import Optimization
from portllm.study.resources import Layout, zero_stage
from portllm.work.deepspeed_config import BUCKET, deepspeed_config

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
    assert [zero_stage(Layout(), 1, t, "float32") for t in ("lora", "full")] == [0, 0]
    assert [zero_stage(Layout(), 2, t, "float32") for t in ("lora", "full")] == [2, 1]
    assert [zero_stage(Layout(), 1, t, "float16") for t in ("lora", "full")] == [1, 1]
    assert zero_stage(Layout(zero=3), 2, "full", "bfloat16") == 3


@pytest.mark.parametrize(
    ("layout", "trains", "message"),
    [
        (Layout(zero=3), "lora", "ZeRO-3 with LoRA"),
        (Layout(zero=4), "full", "no ZeRO stage"),
        (Layout(zero=0, offload=True), "full", "offload"),
        (Layout(zero=0), "float16", "float16 needs a ZeRO stage"),
    ],
)
def test_what_cannot_work_is_refused_with_its_mend(layout: Layout, trains: Any, message: str) -> None:
    optimization = replace(OPTIMIZATION, dtype="float16") if trains == "float16" else OPTIMIZATION
    with pytest.raises(SpecError, match=message):
        deepspeed_config(optimization, layout, 2, "full" if trains == "float16" else trains)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"optimizer": {"type": "Adam"}}, "my.json: `optimizer` belongs to the recipe: the study says `learning_rate`"),
        ({"train_batch_size": 64}, "`train_batch_size` belongs to the recipe: the study says `batch`"),
        ({"bf16": {"enabled": True}}, "the study says `dtype`"),
        ({"zero_optimisation": {}}, "no resource of DeepSpeed's; did you mean `zero_optimization`"),
        ({"zero_optimization": {"stage": 3}}, "stage is 3, and the study says zero: 1"),
        ({"zero_optimization": {"reduce_bucket_size": "auto"}}, "n.reduce_bucket_size` is 'auto', not a whole"),
        ({"zero_optimization": {"reduce_bucket_size": 0.5}}, "is 0.5, not a whole number of at least 1"),
        ({"zero_optimization": {"stage": 5}}, "`zero_optimization.stage` is 5, not one of 0, 1, 2 and 3"),
        ({"zero_optimization": {"stage": "2"}}, "`zero_optimization.stage` is '2', not one of 0, 1, 2 and 3"),
        ({"zero_optimization": {"overlap_comm": 1}}, "`zero_optimization.overlap_comm` is 1, not true or false"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "is 'nvme', not cpu or none"),
        ({"zero_optimization": {"offload_optimizer": {"pin_memory": True}}}, "names no `device`: write device: cpu"),
        ({"zero_optimization": 2}, "`zero_optimization` is 2, not a mapping"),
        ({"zero_optimization": {"offload_optimizer": "cpu"}}, "`zero_optimization.offload_optimizer` is 'cpu', not a"),
    ],
)  # fmt: skip
def test_a_configuration_of_the_user_s_own_may_set_resources_only(own: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        laid_over(Layout(zero=1), own, "resources.update.deepspeed: my.json")


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "`data_types` belongs to the recipe: the study says `dtype`"),
        ({"communication_data_type": "bf16"}, "`communication_data_type` is 'bf16', not fp32: fewer bits"),
        ({"zero_optimization": {"zenflow": {}}}, "`zero_optimization.zenflow` .* changes numbers; leave it out"),
        ({"zero_optimization": {"zero_quantized_gradients": True}}, "n.zero_quantized_gradients` .* changes numbers"),
        ({"zero_optimization": {"zero_quantized_weights": True}}, "n.zero_quantized_weights` .* changes numbers"),
        ({"zero_optimization": {"overlap_com": True}}, "n.overlap_com` .* did you mean `overlap_comm`"),
        ({"zero_optimization": {"prefetch_bucket_size": 1}}, "did you mean `stage3_prefetch_bucket_size`"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu", "pin_memry": True}}}, "mean `pin_memory`"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu", "ratio": 0.3}}}, "another optimizer"),
        ({"zero_optimization": {"cpu_offload": True}}, "write offload_optimizer: {device: cpu}"),
        ({"aio": {"queue_dept": 3}}, "`aio.queue_dept` is no resource of DeepSpeed's; did you mean `queue_depth`"),
        ({"zero_allow_untested_optimizer": False}, "is False, not true, as any training here needs it"),
        ({"activation_checkpointing": {"cpu_checkpointing": True}}, "the study says `gradient_checkpointing`"),
    ],
)  # fmt: skip
def test_what_changes_numbers_or_is_misspelt_in_a_section_is_refused_by_name(own: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        laid_over(Layout(), own, "resources.update.deepspeed: my.json")


@pytest.mark.parametrize(
    ("layout", "own", "message"),
    [
        (Layout(), {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, "at least 1"),
        (Layout(zero=0), {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "the stage is 0: write"),
        (Layout(offload=True), {"zero_optimization": {"stage": 0}}, "offloading needs a ZeRO stage of at least 1"),
        (Layout(offload=True), {"zero_optimization": {"offload_optimizer": {"device": "none"}}}, "says offload: true"),
        (Layout(), {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "and the stage is 2"),
        (Layout(), {"zero_optimization": {"stage3_max_live_parameters": 9}}, "alone, and no stage is named"),
        (Layout(zero=3, workers=4), {"zero_optimization": {"zero_hpz_partition_size": 3}}, "3 does not divide .* 4"),
        (Layout(), {"gradient_predivide_factor": 2.0}, "factor needs zero_optimization.reduce_scatter: false"),
        (Layout(), {"prescale_gradients": True}, "prescale_gradients needs zero_optimization.reduce_scatter: false"),
    ],
)  # fmt: skip
def test_fields_that_contradict_each_other_or_the_study_are_refused(
    layout: Layout, own: dict[str, Any], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        laid_over(layout, own, "resources.update.deepspeed: my.json")


EVERYTHING: dict[str, Any] = {
    "zero_optimization": {
        "stage": 3, "reduce_bucket_size": 5e3, "allgather_bucket_size": 1000, "overlap_comm": True,
        "contiguous_gradients": True, "sub_group_size": 1000, "stage3_max_live_parameters": 1e9,
        "stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True,
        "offload_param": {"device": "cpu", "pin_memory": False},
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
    },
    "communication_data_type": "fp32", "steps_per_print": 5, "wall_clock_breakdown": False,
}  # fmt: skip


def test_what_moves_memory_and_time_may_be_set() -> None:
    layout = laid_over(Layout(), EVERYTHING, "my.json")
    assert (layout.zero, layout.offload) == (3, True)
    made = deepspeed_config(OPTIMIZATION, layout, 2, "full")
    assert made["zero_optimization"] == EVERYTHING["zero_optimization"]


def test_deepspeed_knows_every_field_that_is_named_here() -> None:
    from deepspeed.runtime.zero import config, leaf_module_config, offload_config

    def names(kind: Any) -> set[str]:
        return {field.alias or name for name, field in kind.model_fields.items()}

    sections = {
        "zero_optimization": config.DeepSpeedZeroConfig,
        "zero_optimization.offload_optimizer": offload_config.DeepSpeedZeroOffloadOptimizerConfig,
        "zero_optimization.offload_param": offload_config.DeepSpeedZeroOffloadParamConfig,
        "zero_optimization.leaf_module": leaf_module_config.DeepSpeedZeroLeafModuleConfig,
    }
    for path, kind in sections.items():
        allowed: Any = RESOURCES
        for part in path.split("."):
            allowed = allowed[part]
        refused = {name.removeprefix(f"{path}.") for name in REFUSED if name.rpartition(".")[0] == path}
        assert allowed.keys() | refused == names(kind)
        assert not allowed.keys() & refused


def test_offloading_in_a_configuration_of_the_user_s_own_is_seen_by_the_plan() -> None:
    layout = laid_over(Layout(), {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "f")
    assert (layout.zero, layout.offload) == (2, True)
    assert deepspeed_config(OPTIMIZATION, layout, 2, "full")["zero_force_ds_cpu_optimizer"] is False


def test_the_module_is_imported_without_torch() -> None:
    import subprocess
    import sys

    code = "import sys, portllm.work.deepspeed_config; assert not {'torch', 'deepspeed'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
