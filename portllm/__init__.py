"""portllm: port LoRA patches across updates of their base model, or learn when to refit them."""

__version__ = "0.1.0"
