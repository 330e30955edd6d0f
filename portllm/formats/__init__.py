"""How things on disk are read: safetensors headers, PEFT adapters, lm-eval tasks. A leaf without torch."""
