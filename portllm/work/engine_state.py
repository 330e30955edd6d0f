"""The state of a DeepSpeed engine as whole tensors: the same whatever the ranks, the ZeRO stage and the compute dtype.

    of each parameter that moves: its fp32 master and AdamW's two moments, each in the parameter's own shape

What is read with one number of ranks can be written to another. Schedule and data position are functions of the step,
and nothing in a training draws random numbers, so these and a few numbers are all there is to a training's state.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's, as torch names them."""
_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What a dynamic loss scale remembers (float16)."""


def moving(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def master(engine: Any, parameter: nn.Parameter) -> Tensor:
    """The fp32 master of a parameter, whole. Collective under ZeRO 1-3; not a copy without it."""
    return _whole(engine, parameter, None)


def set_master(engine: Any, parameter: nn.Parameter, value: Tensor) -> None:
    """Puts a whole fp32 master in its place, and what it rounds to into the parameter."""
    _put(engine, parameter, None, value)


def stepped(engine: Any) -> bool:
    """Whether the optimizer has taken a step."""
    return any(MOMENTS[0] in state for state in engine.basic_optimizer.state.values())


def read(engine: Any, mine: frozenset[str]) -> dict[str, Tensor]:
    """{kind/name: fp32 tensor} in host memory of the parameters named in `mine`: copies. Collective."""
    found: dict[str, Tensor] = {}
    for name, parameter in moving(engine.module).items():
        for kind in (None, *MOMENTS):
            whole = _whole(engine, parameter, kind)  # every rank takes part, whoever keeps it
            if name in mine:
                found[f"{kind or 'master'}/{name}"] = whole.detach().to("cpu", torch.float32, copy=True)
    return found


def numbers(engine: Any) -> dict[str, float]:
    """Everything else: AdamW's count of steps, and the loss scale."""
    steps = next(float(state["step"]) for state in engine.basic_optimizer.state.values())
    scaler = _scaler(engine)
    scale = {name: float(value) for name in _SCALER if (value := getattr(scaler, name, None)) is not None}
    return {"steps": steps} | scale


def write(engine: Any, tensors: Any, values: dict[str, float]) -> None:
    """Puts what `read` and `numbers` gave into an engine that has not stepped yet; every rank needs all of it.

    `tensors(name)` gives a tensor by its name in `read`.
    """
    _allocate(engine, values["steps"])
    for name, parameter in moving(engine.module).items():
        for kind in (None, *MOMENTS):
            _put(engine, parameter, kind, tensors(f"{kind or 'master'}/{name}"))
    scaler = _scaler(engine)
    for name in set(_SCALER) & values.keys():
        setattr(scaler, name, type(getattr(scaler, name))(values[name]))


def _allocate(engine: Any, steps: float) -> None:
    """AdamW's state, which torch and DeepSpeed make at the first step only."""
    for tensor in _stepped(engine):
        moments = {kind: torch.zeros_like(tensor) for kind in MOMENTS}
        engine.basic_optimizer.state[tensor] = {"step": torch.tensor(steps), **moments}
    # ZeRO 1, 2 and the bf16 optimizer tie each parameter to its part of the state at their first step.
    link = getattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
    if link is not None:
        link()


def _stepped(engine: Any) -> Iterator[Tensor]:
    """The tensors that torch's optimizer steps: parameters, their masters, or this rank's flat part of them."""
    flat = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)  # ZeRO-3 shows them to it one by one
    groups = engine.basic_optimizer.param_groups
    yield from flat if flat is not None else (p for group in groups for p in group["params"])


def _whole(engine: Any, parameter: nn.Parameter, kind: str | None) -> Tensor:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if _parted(parameter):
        whole = safe_get_full_optimizer_state(parameter, kind) if kind else safe_get_full_fp32_param(parameter)
        assert whole is not None
        return whole.view(parameter.ds_shape if hasattr(parameter, "ds_shape") else parameter.shape)
    own = _own_master(engine, parameter)
    return own if kind is None else engine.basic_optimizer.state[own][kind]


def _put(engine: Any, parameter: nn.Parameter, kind: str | None, value: Tensor) -> None:
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    value = value.to(parameter.device)
    if hasattr(parameter, "ds_id"):
        _put_part(engine, parameter, kind, value)
    elif kind is not None and _parted(parameter):
        safe_set_full_optimizer_state(parameter, value, kind)
    elif kind is not None:
        engine.basic_optimizer.state[_own_master(engine, parameter)][kind].copy_(value)
    else:
        parameter.data.copy_(value)
        if _parted(parameter):
            safe_set_full_fp32_param(parameter, value)
        else:
            _own_master(engine, parameter).data.copy_(value)


def _put_part(engine: Any, parameter: Any, kind: str | None, value: Tensor) -> None:
    """ZeRO-3: this rank's part, padded where the ranks do not divide it (`safe_set_full_*` fails there)."""
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    size = parameter.ds_tensor.numel()
    flat = nn.functional.pad(value.flatten(), (0, size * engine.dp_world_size - value.numel()))
    part = flat[size * engine.global_rank :][:size]
    if kind is not None:
        safe_set_local_optimizer_state(parameter, part, kind)
    else:
        safe_set_local_fp32_param(parameter, part)
        parameter.ds_tensor.data.copy_(part)


def _parted(parameter: nn.Parameter) -> bool:
    """Whether DeepSpeed keeps the master elsewhere: ZeRO 1-3, and bf16 with fp32 sums."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def _own_master(engine: Any, parameter: nn.Parameter) -> Tensor:
    """Without ZeRO: the parameter itself in fp32, else the copy of it that the optimizer steps."""
    for low, high in zip(*(getattr(engine.optimizer, n, ()) for n in ("fp16_groups", "fp32_groups")), strict=True):
        for mine, fp32 in zip(low, high, strict=True):
            if mine is parameter:
                return fp32
    return parameter


def _scaler(engine: Any) -> Any:
    """What holds the loss scale: without ZeRO under another name."""
    names = ("loss_scale_config", "loss_scaler")
    return next((found for name in names if (found := getattr(engine.optimizer, name, None))), engine.optimizer)
