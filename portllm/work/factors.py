"""ΔW by its factors, without the dense matrix: ΔW_OI = B_OR · A_RI in float64. R rank, I in, O out."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from portllm.errors import ResolveError
from portllm.formats.adapter import Target
from portllm.work.patches import read_tensor


@dataclass(frozen=True)
class Factors:
    """ΔW_OI = B_OR · A_RI with the scale in B, float64."""

    B_OR: Tensor
    A_RI: Tensor

    @classmethod
    def of(cls, target: Target) -> "Factors":
        B_OR, A_RI = read_tensor(target.B_OR).double(), read_tensor(target.A_RI).double()
        if not (torch.isfinite(B_OR).all() and torch.isfinite(A_RI).all()):
            raise ResolveError(f"{target.A_RI.file}: the factors of `{target.module}` hold NaN or infinity")
        return cls(B_OR * target.scale, A_RI)

    @property
    def rank(self) -> int:
        """Directions, at most."""
        return len(self.A_RI)

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """(U_OR, σ_R descending, V_IR) of ΔW."""
        Q_OR, left = torch.linalg.qr(self.B_OR)
        Q_IR, right = torch.linalg.qr(self.A_RI.T)
        u, sigma, v = torch.linalg.svd(left @ right.T)
        count = len(sigma)
        return Q_OR @ u[:, :count], sigma, Q_IR @ v.T[:, :count]

    def times(self, scale: float) -> "Factors":
        """λΔW."""
        return Factors(self.B_OR * scale, self.A_RI)

    def truncated(self, rank: int) -> "Factors":
        """The nearest of at most that rank (Eckart and Young, 1936), its singular values shared between both halves."""
        U_OR, sigma_R, V_IR = self.svd()
        root_R = sigma_R[:rank].sqrt()
        return Factors(U_OR[:, :rank] * root_R, (V_IR[:, :rank] * root_R).T)

    def norm(self) -> float:
        """‖ΔW‖_F: its square is the trace of (BᵀB)(AAᵀ)."""
        return float(((self.B_OR.T @ self.B_OR) * (self.A_RI @ self.A_RI.T)).sum().clamp(min=0).sqrt())


def stacked(parts: Sequence[Factors]) -> Factors:
    """The sum, exactly: ranks add up."""
    return Factors(torch.cat([part.B_OR for part in parts], dim=1), torch.cat([part.A_RI for part in parts]))
