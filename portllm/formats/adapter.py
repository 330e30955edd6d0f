"""PEFT's LoRA adapters on disk, as far as ΔW = scale·B·A is the whole of what they do.

`read_adapter` reads `adapter_config.json` and the header of `adapter_model.safetensors`; whatever else an adapter may
do (DoRA, biases, saved modules, changed bases, …) is refused by name, never skipped. `check_fits` holds every target's
name and shape against a model's tensors. No tensor is read here. R rank, I in, O out.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from portllm.errors import ResolveError
from portllm.formats.tensors import ADAPTER, STORAGE, TensorEntry, read_header, read_json

CONFIG = "adapter_config.json"
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<half>[AB])\.weight")
_LAYER = re.compile(r"(?P<stack>.*?)\.(?P<index>\d+)\.")
_HEADS = ("lm_head", "embed_out")

_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base weights alone; the others subtract from them."""
_HARMLESS = frozenset({
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "corda_config",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core",
    "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "target_modules", "task_type",
    "use_rslora",
})  # fmt: skip
"""Fields read here, or without a say in ΔW. Any other field that is set is refused: it may change the forward pass."""
_MEANING = {
    "use_dora": "DoRA", "bias": "trained biases", "lora_bias": "a bias on lora_B", "modules_to_save": "saved modules",
    "target_parameters": "targets that are parameters (fused experts)", "trainable_token_indices": "trained tokens",
    "layer_replication": "replicated layers", "use_qalora": "QALoRA", "use_bdlora": "block-diagonal LoRA",
    "alora_invocation_tokens": "activated LoRA", "arrow_config": "Arrow routing", "kasa_config": "KaSA",
    "velora_config": "VeLoRA", "monteclora_config": "MonteCLoRA", "megatron_config": "Megatron layers",
    "ensure_weight_tying": "tied adapters",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Target:
    """One module's delta: ΔW_OI = scale · B_OR · A_RI."""

    module: str
    """Name in the model, as `model.layers.0.self_attn.q_proj`."""
    rank: int
    alpha: float
    scale: float
    """alpha/rank, or alpha/√rank with rsLoRA."""
    A_RI: TensorEntry
    B_OR: TensorEntry

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return self.B_OR.shape[0], self.A_RI.shape[1]


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter whose every effect is the delta of its targets."""

    directory: Path
    targets: Mapping[str, Target]
    """By module name."""
    transposed: bool
    """PEFT's `fan_in_fan_out`: the model stores W_IO (GPT-2's Conv1D), so the delta is added transposed."""
    base: str | None
    """What the adapter says it was trained on."""
    config: Mapping[str, Any]
    """All of `adapter_config.json`."""

    def weight_shape(self, module: str) -> tuple[int, int]:
        """Shape of the stored weight the target fits."""
        out, into = self.targets[module].shape
        return (into, out) if self.transposed else (out, into)


@dataclass(frozen=True)
class Mismatch:
    """One target that does not fit a model."""

    module: str
    reason: str
    """A sentence that follows "patch targets `module`, "."""


def read_adapter(directory: Path) -> Adapter:
    """The adapter in a directory written by PEFT; `ResolveError` names whatever is not exactly ΔW = scale·B·A."""
    if not directory.is_dir():
        raise ResolveError(f"{directory}: no such patch directory")
    config = _config(directory)
    halves = _halves(directory)
    targets = {module: _target(directory, config, module, *pair) for module, pair in sorted(halves.items())}
    if not targets:
        raise ResolveError(f"{directory / ADAPTER}: holds no LoRA tensors; the patch is empty")
    base = config.get("base_model_name_or_path")
    return Adapter(directory, targets, config.get("fan_in_fan_out") is True, base or None, config)


def _config(directory: Path) -> dict[str, Any]:
    """`adapter_config.json`, once nothing in it goes beyond plain LoRA."""
    file = directory / CONFIG
    if not file.is_file():
        raise ResolveError(f"{directory}: no {CONFIG}; a patch is a directory written by PEFT's save_pretrained")
    config = read_json(file)
    if config.get("peft_type") != "LORA":
        raise ResolveError(f"{file}: peft_type is {config.get('peft_type')!r}; patches are LORA")
    if config.get("init_lora_weights", True) not in _PLAIN_INITS:
        raise ResolveError(
            f"{file}: init_lora_weights is {config['init_lora_weights']!r}, which changes the base weights too; save "
            "it as plain LoRA with save_pretrained(OUT, path_initial_model_for_weight_conversion=…)"
        )
    for name, value in config.items():
        if name not in _HARMLESS and value not in (None, False, "none", [], {}):
            what = f" ({_MEANING[name]})" if name in _MEANING else ""
            raise ResolveError(f"{file}: `{name}` is {value!r}{what}, which cannot be applied exactly yet")
    _require_types(file, config)
    return config


def _require_types(file: Path, config: Mapping[str, Any]) -> None:
    """The fields that enter ΔW have the types they need."""
    for field, pattern, fits in (("r", "rank_pattern", _is_rank), ("lora_alpha", "alpha_pattern", _is_alpha)):
        by_module = config.get(pattern) or {}
        if not isinstance(by_module, dict):
            raise ResolveError(f"{file}: `{pattern}` is {by_module!r}, no mapping from module names")
        for name, value in {field: config.get(field), **by_module}.items():
            if not fits(value):
                raise ResolveError(f"{file}: `{name}` is {value!r}; ranks are positive integers, alphas finite numbers")
    for field in ("use_rslora", "fan_in_fan_out"):
        if config.get(field) not in (None, True, False):
            raise ResolveError(f"{file}: `{field}` is {config[field]!r}, neither true nor false")


def _is_rank(value: object) -> bool:
    return type(value) is int and value > 0


def _is_alpha(value: object) -> bool:
    return type(value) in (int, float) and -1e30 < value < 1e30  # type: ignore[operator]


def _halves(directory: Path) -> dict[str, tuple[TensorEntry, TensorEntry]]:
    """(A_RI, B_OR) of each module; every tensor of the file is one of them."""
    file = directory / ADAPTER
    if not file.is_file():
        pickled = " but adapter_model.bin (safetensors only: load and save it again with PEFT)"
        has = pickled if (directory / "adapter_model.bin").is_file() else ""
        raise ResolveError(f"{directory}: no {ADAPTER}{has}")
    found: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in read_header(file).items():
        match = _KEY.fullmatch(name)
        if match is None:
            raise ResolveError(
                f"{file}: `{name}` is no lora_A or lora_B of a linear layer: it cannot be applied exactly"
            )
        found.setdefault(match["module"], {})[match["half"]] = entry
    for module, pair in found.items():
        if len(pair) < 2:
            raise ResolveError(f"{file}: `{module}` has lora_{next(iter(pair))} only; the patch is damaged")
    return {module: (pair["A"], pair["B"]) for module, pair in found.items()}


def _target(directory: Path, config: Mapping[str, Any], module: str, A_RI: TensorEntry, B_OR: TensorEntry) -> Target:
    """One module's delta, its shapes checked against each other and the configured rank."""
    rank = _by_pattern(directory, config, "rank_pattern", module, config["r"])
    alpha = _by_pattern(directory, config, "alpha_pattern", module, config["lora_alpha"])
    where = f"{directory / ADAPTER}: `{module}`"
    for half, entry in (("lora_A", A_RI), ("lora_B", B_OR)):
        if entry.dtype not in STORAGE:
            raise ResolveError(f"{where}: {half} is stored as {entry.dtype}, not as {', '.join(STORAGE)}")
        if len(entry.shape) != 2 or 0 in entry.shape:
            raise ResolveError(f"{where}: {half} has shape {list(entry.shape)}, not that of a matrix with content")
    if (A_RI.shape[0], B_OR.shape[1]) != (rank, rank):
        raise ResolveError(
            f"{where}: lora_A {list(A_RI.shape)} and lora_B {list(B_OR.shape)} do not have the configured rank {rank}"
        )
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return Target(module, rank, alpha, scale, A_RI, B_OR)


def _by_pattern(directory: Path, config: Mapping[str, Any], field: str, module: str, default: Any) -> Any:
    """The value of `rank_pattern` or `alpha_pattern` for a module: the first key that ends its name, as in PEFT."""
    for pattern, value in (config.get(field) or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise ResolveError(f"{directory / CONFIG}: `{field}` holds {pattern!r}, no pattern ({error})") from error
    return default


def weight_name(module: str, tensors: Mapping[str, TensorEntry]) -> str | None:
    """The stored tensor of a module's weight.

    A checkpoint of the bare model lacks the head model's prefix (`transformer.`, `model.`) on every name, and
    transformers adds it on loading: so does this.
    """
    name = f"{module}.weight"
    prefix, _, bare = name.partition(".")
    if name not in tensors and bare in tensors and not any(other.startswith(f"{prefix}.") for other in tensors):
        return bare
    return name if name in tensors else None


def check_fits(adapter: Adapter, tensors: Mapping[str, TensorEntry], tied: bool = False) -> list[Mismatch]:
    """Every target that does not fit a model's tensors. `tied`: the model's head is its embedding."""
    return [
        Mismatch(module, reason)
        for module in adapter.targets
        if (reason := _misfit(adapter, module, tensors, tied)) is not None
    ]


def require_fits(adapter: Adapter, tensors: Mapping[str, TensorEntry], tied: bool = False) -> None:
    """Raises `ResolveError` with the first mismatch and how many more there are."""
    if mismatches := check_fits(adapter, tensors, tied):
        first, more = mismatches[0], len(mismatches) - 1
        others = f" (and {more} more of {len(adapter.targets)} targets do not fit)" if more else ""
        raise ResolveError(f"{adapter.directory}: patch targets `{first.module}`, {first.reason}{others}")


def _misfit(adapter: Adapter, module: str, tensors: Mapping[str, TensorEntry], tied: bool) -> str | None:
    name = weight_name(module, tensors)
    if tied and module.rpartition(".")[2] in _HEADS:
        return "the version ties it to its embeddings: untie them first, or train the patch without it"
    if name is None:
        return _why_absent(module, tensors)
    entry, wanted = tensors[name], adapter.weight_shape(module)
    if entry.dtype not in STORAGE:
        return f"the version stores it as {entry.dtype}: patches are added to {', '.join(STORAGE.values())} only"
    if entry.shape == wanted:
        return None
    if entry.shape == wanted[::-1]:
        return f"the version stores it transposed: fan_in_fan_out in {CONFIG} should be {not adapter.transposed}"
    shapes = f"the version's weight is {_times(entry.shape)}, the patch's {_times(wanted)}"
    return f"{shapes}: it was trained on another model"


def _why_absent(module: str, tensors: Mapping[str, TensorEntry]) -> str:
    match = _LAYER.match(module)
    layers = _layers(match["stack"], tensors) if match else 0
    if match and 0 < layers <= int(match["index"]):
        return f"the version has {layers} layers: it was trained on another model"
    return "the version has no such tensor: it was trained on another architecture"


def _layers(stack: str, tensors: Mapping[str, TensorEntry]) -> int:
    """Layers of the stack named (`model.layers`): one more than the largest index."""
    found = (_LAYER.match(name) for name in tensors)
    return max((int(match["index"]) + 1 for match in found if match and match["stack"] == stack), default=0)


def _times(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))
