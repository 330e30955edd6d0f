"""Resources: where and how a step runs. Never hashed; they may move rounding only, and a test bounds it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from portllm.errors import SpecError

Trains = Literal["lora", "full"]
"""What moves in a training."""
CPU_TOKENS, GPU_TOKENS = 2048, 16384


@dataclass(frozen=True)
class Layout:
    """Resources of one step."""

    workers: int = 1
    """Ranks of a training. 1 runs in a warm worker, more in a gang under Ray Train."""
    threads: int = 1
    """CPU threads (and Ray CPUs) per worker: fixed by the study, never cores divided by workers alive."""
    gpus: int = 0
    """GPUs per worker."""
    zero: int | None = None
    """DeepSpeed ZeRO stage; what None means, `zero_stage` says."""
    micro_tokens: int | None = None
    """Tokens of a forward pass, padding included. None: 2,048 on a CPU, 16,384 on a GPU."""
    gradient_checkpointing: bool = False
    offload: bool = False
    """Optimizer state in host memory (ZeRO offload)."""

    checkpoint_s: float = 120
    """A training's state is kept at most so often, in seconds."""

    deepspeed: Mapping[str, Any] = field(default_factory=dict)
    """DeepSpeed's own resource settings, laid over ours."""
    peak_flops: float | None = None
    """FLOP/s of one worker's device, for its utilisation. None: its matrix products are measured."""

    @property
    def devices(self) -> int:
        """What a step is charged for: GPUs, or workers without one."""
        return self.workers * max(1, self.gpus)

    @property
    def budget(self) -> int:
        """Tokens of a forward pass: what is set, or a default that keeps Gemma 3 270M in 4 GB on a CPU."""
        return self.micro_tokens or (GPU_TOKENS if self.gpus else CPU_TOKENS)


def zero_stage(layout: Layout, world: int, trains: Trains, dtype: str) -> int:
    """The layout's ZeRO stage, or its default: 0 alone (1 with offload or in float16), else 2 for LoRA and 1 for full
    weights.

    Outside ZeRO, DeepSpeed divides float16's gradients by the loss scale and never multiplies the loss with it
    (`runtime/engine.py`, `_scale_loss`): AdamW would see gradients 65,536 times too small.
    """
    if layout.zero is None:
        if world == 1:
            return 1 if layout.offload or dtype == "float16" else 0
        return 2 if trains == "lora" else 1
    if layout.zero not in (0, 1, 2, 3):
        raise SpecError(f"resources: `zero: {layout.zero}` is no ZeRO stage; there are 0, 1, 2 and 3")
    if layout.zero == 3 and trains == "lora":
        raise SpecError("resources: ZeRO-3 with LoRA can save empty adapters (peft #2892): set `zero: 2`, or none")
    if layout.zero == 0 and layout.offload:
        raise SpecError("resources: `offload` needs a ZeRO stage of at least 1; set `zero: 1`, or leave it out")
    if layout.zero == 0 and dtype == "float16":
        raise SpecError("resources: float16 needs a ZeRO stage of at least 1; set `zero: 1`, or leave it out")
    return layout.zero
