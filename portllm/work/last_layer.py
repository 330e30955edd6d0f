"""The last layer computes only at the positions that are read.

Nothing behind the last layer mixes positions: where its result is not read, only its keys and values count. Its
queries, its attention's output and its inner network therefore run at the read positions alone, forward and backward,
which saves nearly one layer of all: 14 % with 6 layers.

Shape suffixes: B rows, S positions, N read positions, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from portllm.work.head import body

_POSITIONWISE = ("q_proj", "o_proj", "dense", "c_proj", "mlp")
"""Modules of a layer, as the families call them, that treat each position by itself."""
_MOST = 0.5
"""Share of all positions up to which picking them out is worth it."""

_fits: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""Models tried so far: whether their results at the read positions stayed as they were."""


class LastLayer:
    """A loaded causal model's last layer; does nothing for a model that is not built as expected."""

    def __init__(self, model: Any) -> None:
        # A layer that is computed again in the backward pass would be so outside the block.
        again = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        self._modules = [] if again else list(_positionwise(model))
        if self._modules and model not in _fits:
            _fits[model] = self._stays(model)
        if not _fits.get(model, False):
            self._modules = []

    @contextmanager
    def reading(self, read_N: torch.Tensor, positions: int) -> Iterator[None]:
        """Forward passes of B × S = `positions` inside the block are right only at `read_N`, each b · S + s."""
        with ExitStack() as stack:
            if len(read_N) <= _MOST * positions:
                for module in self._modules:
                    stack.enter_context(_at(module, read_N))
            yield

    def _stays(self, model: Any) -> bool:
        """Whether a short forward pass gives the same hidden states at the read positions."""
        ids_BS = torch.arange(12, device=model.device).view(2, 6) % model.config.get_text_config().vocab_size
        read_N = torch.tensor([3, 10], device=model.device)
        with torch.no_grad():
            whole_BSD = body(model)(input_ids=ids_BS, use_cache=False).last_hidden_state.float()
            try:
                with ExitStack() as stack:
                    for module in self._modules:
                        stack.enter_context(_at(module, read_N))
                    part_BSD = body(model)(input_ids=ids_BS, use_cache=False).last_hidden_state.float()
            except _NotPositionwise:
                return False
        whole_ND, part_ND = whole_BSD.flatten(0, 1)[read_N], part_BSD.flatten(0, 1)[read_N]
        tolerance = 1e-3 if model.dtype == torch.float32 else 0.05
        return bool((whole_ND - part_ND).abs().max() <= tolerance * whole_ND.abs().max().clamp(min=1.0))


class _NotPositionwise(Exception):
    """A module that does not map one tensor [B, S, D] to another."""


def _positionwise(model: Any) -> Iterator[nn.Module]:
    """The modules to run at the read positions only, none inside another."""
    lists = [child for child in body(model).children() if isinstance(child, nn.ModuleList)]
    if not lists:
        return
    taken: list[str] = []
    for name, module in max(lists, key=len)[-1].named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in taken)
        if name.rpartition(".")[2] in _POSITIONWISE and not inside:
            taken.append(name)
            yield module


@contextmanager
def _at(module: nn.Module, read_N: torch.Tensor) -> Iterator[None]:
    """`module` maps [B, S, D] at `read_N` and leaves zeros elsewhere."""
    shape: list[int] = []

    def pick(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(inputs) != 1 or not isinstance(inputs[0], torch.Tensor) or inputs[0].dim() != 3:
            raise _NotPositionwise
        shape[:] = inputs[0].shape[:2]
        return (inputs[0].flatten(0, 1)[read_N][None],)

    def put(_: nn.Module, __: tuple[Any, ...], output: Any) -> torch.Tensor:
        if not isinstance(output, torch.Tensor) or output.shape[:2] != (1, len(read_N)):
            raise _NotPositionwise
        whole_TD: torch.Tensor = output.new_zeros(shape[0] * shape[1], output.shape[2])
        whole_TD[read_N] = output[0]
        return whole_TD.view(*shape, -1)

    hooks = module.register_forward_pre_hook(pick), module.register_forward_hook(put)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
