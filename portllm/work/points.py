"""A training's curve: what is known of each optimizer step."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Point:
    """One optimizer step of the training curve."""

    step: int
    loss: float
    """Mean over the global batch's targets, before the step."""
    learning_rate: float
    grad_norm: float
    """Before clipping."""
    tokens: int
    seconds: float
    elapsed_s: float = 0.0
    """Of training until the step was done, over all attempts; 0 in checkpoints that do not say."""

    def values(self) -> dict[str, float]:
        rate = self.tokens / max(self.seconds, 1e-9)
        return {
            "loss": self.loss,
            "learning_rate": self.learning_rate,
            "grad_norm": self.grad_norm,
            "tokens_per_s": round(rate, 1),
            "elapsed_s": round(self.elapsed_s, 3),
        }
