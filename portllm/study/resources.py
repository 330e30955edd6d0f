"""Resources: where and how a step runs. Never hashed; they may move rounding only, and a test bounds it."""

from dataclasses import dataclass


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
    micro_batch: int | None = None
    """Sequences per forward pass and worker. None: the worker's whole share of the global batch."""
    gradient_checkpointing: bool = False
    offload: bool = False
    """Optimizer state in host memory (ZeRO offload)."""
