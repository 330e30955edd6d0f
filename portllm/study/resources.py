"""Resources: where and how a step runs. Never hashed; they may move rounding only, and a test bounds it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

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
    """DeepSpeed ZeRO stage. None: 0 with one worker; with several, 2 for LoRA and 1 for full weights."""
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
