"""PEFT's LoRA adapters on disk: what they do to a model's tensors, as exactly as PEFT's own merge does it.

`read_adapter` reads `adapter_config.json` and the header of `adapter_model.safetensors`: deltas ΔW = scale·B·A of
linear layers and embeddings, DoRA's magnitudes, biases, saved modules. Whatever else an adapter may do is refused by
name, never skipped. `check_fits` holds every name and shape against a model's tensors. No tensor is read here.
R rank, I in, O out.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from portllm.errors import ResolveError
from portllm.formats.tensors import ADAPTER, STORAGE, TensorEntry, read_header, read_json

CONFIG = "adapter_config.json"
_PARTS = {
    "lora_A.weight": "A", "lora_B.weight": "B", "lora_embedding_A": "A", "lora_embedding_B": "B", "lora_B.bias": "bias",
    "lora_magnitude_vector": "magnitude", "lora_magnitude_vector.weight": "magnitude",
}  # fmt: skip
"""What a tensor is to its module, by the end of its name."""
_PREFIX = "base_model.model."
_LAYER = re.compile(r"(?P<stack>.*?)\.(?P<index>[0-9]{1,9})\.")
HEADS = ("lm_head", "embed_out", "output_projection")
EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings", "embeddings", "tokens_embed", "w")
"""Of Llama, GPT-2, GPT-NeoX, BLOOM, InternLM, Mamba, GPT, CTRL and their like."""
RENAMED = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.", "model.language_model."),
    ("model.", "language_model.model."),
    ("model.", "backbone."),
    ("lm_head.", "embed_out."),
)
"""Prefixes in memory and in files, where transformers renames one to one on loading: Gemma 3 and Mistral 3 with their
vision, Qwen3.5 and Llama 4 with theirs read as text models, Nemotron-H, GPT-NeoX."""

_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base weights alone; the others subtract from them."""
_HARMLESS = frozenset({
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform",
    "loftq_config", "lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config", "megatron_core", "modules_to_save",
    "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "target_modules", "task_type",
    "use_dora", "use_rslora",
})  # fmt: skip
"""Fields read here, or without a say in ΔW. Any other field that is set is refused: it may change the forward pass."""
_MEANING = {
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
    transposed: bool = False
    """The model stores W_IO: an embedding (I tokens, O dimensions), or GPT-2's Conv1D (PEFT's `fan_in_fan_out`)."""
    magnitude: TensorEntry | None = None
    """DoRA's length of each output, [O]: W becomes magnitude · (W + ΔW) / ‖W + ΔW‖."""
    bias: TensorEntry | None = None
    """Added to the layer's bias, times the scale, [O]."""
    embedding: bool = False
    """Of an embedding's rows, not of a linear layer."""

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return self.B_OR.shape[0], self.A_RI.shape[1]

    @property
    def stored_shape(self) -> tuple[int, int]:
        """Shape of the stored weight that the delta fits."""
        return self.shape[::-1] if self.transposed else self.shape


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter, everything it does named."""

    directory: Path
    targets: Mapping[str, Target]
    """By module name."""
    replaced: Mapping[str, TensorEntry]
    """Tensors that take the place of the model's, by name: trained biases and saved modules."""
    copies: Mapping[str, TensorEntry]
    """Weights of the base that PEFT saved along (of embeddings and heads that are targets), by name."""
    base: str | None
    """What the adapter says it was trained on."""
    config: Mapping[str, Any]
    """All of `adapter_config.json`."""

    @property
    def dropout(self) -> float:
        """Share of its inputs that a training of it drops; nothing else reads it."""
        return float(self.config.get("lora_dropout") or 0)

    @property
    def beyond_deltas(self) -> str | None:
        """What it does besides adding: such a patch has no multiple, and does not add up with others."""
        if self.replaced:
            return f"replaces `{min(self.replaced)}`"
        dora = next((name for name, target in self.targets.items() if target.magnitude), None)
        return f"scales `{dora}` (DoRA)" if dora else None


@dataclass(frozen=True)
class Mismatch:
    """One target that does not fit a model."""

    module: str
    reason: str
    """A sentence that follows "patch targets `module`, "."""


def read_adapter(directory: Path) -> Adapter:
    """The adapter in a directory written by PEFT; `ResolveError` names whatever cannot be applied exactly."""
    if not directory.is_dir():
        raise ResolveError(f"{directory}: no such patch directory")
    config = _config(directory)
    parts, whole = _sorted_out(directory, config)
    targets = {module: _target(directory, config, module, found) for module, found in sorted(parts.items())}
    if not targets and not whole:
        raise ResolveError(f"{directory / ADAPTER}: holds no LoRA tensors; the patch is empty")
    replaced = {name: entry for name, entry in whole.items() if not _is_copy(name)}
    copies = {_own(name): entry for name, entry in whole.items() if _is_copy(name)}
    base = config.get("base_model_name_or_path")
    return Adapter(directory, targets, {_own(n): e for n, e in replaced.items()}, copies, base or None, config)


def _is_copy(name: str) -> bool:
    """Whether PEFT saved a target's own weight along with its factors."""
    return name.endswith(".base_layer.weight")


def _own(name: str) -> str:
    """A tensor's name in the model, without the layer that PEFT put around it."""
    return name.replace(".base_layer.", ".")


def _config(directory: Path) -> dict[str, Any]:
    """`adapter_config.json`, once nothing in it goes beyond what is applied here."""
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
    if config.get("bias", "none") not in ("none", "all", "lora_only", None):
        raise ResolveError(f"{file}: `bias` is {config['bias']!r}, which is none of none, all, lora_only")
    if type(dropout := config.get("lora_dropout") or 0) not in (int, float):
        raise ResolveError(f"{file}: `lora_dropout` is {dropout!r}, no number")
    if not isinstance(base := config.get("base_model_name_or_path"), str | None):
        raise ResolveError(f"{file}: `base_model_name_or_path` is {base!r}, no name")
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        raise ResolveError(f"{file}: `modules_to_save` is {saved!r}, no list of names")
    for field in ("use_rslora", "fan_in_fan_out", "use_dora", "lora_bias"):
        if config.get(field) is not None and type(config[field]) is not bool:
            raise ResolveError(f"{file}: `{field}` is {config[field]!r}, neither true nor false")


def _is_rank(value: object) -> bool:
    return type(value) is int and value > 0


def _is_alpha(value: object) -> bool:
    return type(value) in (int, float) and -1e30 < value < 1e30  # type: ignore[operator]


Parts = dict[str, TensorEntry]


def _sorted_out(directory: Path, config: Mapping[str, Any]) -> tuple[dict[str, Parts], dict[str, TensorEntry]]:
    """The parts (A, B, magnitude, bias) of each module, and tensors that are whole; every tensor is one of them."""
    file = directory / ADAPTER
    if not file.is_file():
        pickled = " but adapter_model.bin (safetensors only: load and save it again with PEFT)"
        has = pickled if (directory / "adapter_model.bin").is_file() else ""
        raise ResolveError(f"{directory}: no {ADAPTER}{has}")
    parts: dict[str, Parts] = {}
    whole: dict[str, TensorEntry] = {}
    for name, entry in read_header(file).items():
        bare = name.removeprefix(_PREFIX)
        end = next((end for end in _PARTS if bare.endswith(f".{end}")), None)
        if bare == name or (end is None and not _may_be_whole(bare, config)):
            raise ResolveError(f"{file}: `{name}` is nothing that {CONFIG} speaks of: it cannot be applied exactly")
        if end is None and entry.dtype not in STORAGE:
            raise ResolveError(f"{file}: `{name}` is stored as {entry.dtype}, not as {', '.join(STORAGE)}")
        if end is None:
            whole[bare] = entry
        elif _PARTS[end] in (found := parts.setdefault(bare.removesuffix(f".{end}"), {})):
            raise ResolveError(f"{file}: `{name}` stands there under two names; the patch is damaged")
        else:
            found[_PARTS[end]] = entry
            found |= {"embedding": entry} if "embedding" in end else {}
    return parts, whole


def _may_be_whole(name: str, config: Mapping[str, Any]) -> bool:
    """Whether the configuration says that a whole tensor of this name belongs to the adapter."""
    if name.endswith(".bias") and config.get("bias") not in (None, "none"):
        return True
    saved = tuple(config.get("modules_to_save") or ())
    parts = name.split(".")
    # PEFT takes every module whose name ends so: `norm` is `input_layernorm`, too.
    modules = (".".join(parts[:n]) for n in range(1, len(parts)))
    return _is_copy(name) or any(module.endswith(saved) for module in modules)


def _target(directory: Path, config: Mapping[str, Any], module: str, parts: Parts) -> Target:
    """One module's delta, its shapes checked against each other and the configured rank."""
    where = f"{directory / ADAPTER}: `{module}`"
    if missing := {"A", "B"} - parts.keys():
        has = ", ".join(f"lora_{part}" if part in "AB" else part for part in sorted(parts))
        raise ResolveError(f"{where} has {has} only, no lora_{min(missing)}; the patch is damaged")
    A_RI, B_OR, embedding = parts["A"], parts["B"], "embedding" in parts
    rank = _by_pattern(directory, config, "rank_pattern", module, config["r"])
    alpha = _by_pattern(directory, config, "alpha_pattern", module, config["lora_alpha"])
    for half, entry in (("lora_A", A_RI), ("lora_B", B_OR)):
        if entry.dtype not in STORAGE:
            raise ResolveError(f"{where}: {half} is stored as {entry.dtype}, not as {', '.join(STORAGE)}")
        if len(entry.shape) != 2 or 0 in entry.shape:
            raise ResolveError(f"{where}: {half} has shape {list(entry.shape)}, not that of a matrix with content")
    if (A_RI.shape[0], B_OR.shape[1]) != (rank, rank):
        raise ResolveError(
            f"{where}: lora_A {list(A_RI.shape)} and lora_B {list(B_OR.shape)} do not have the configured rank {rank}"
        )
    magnitude, bias = parts.get("magnitude"), parts.get("bias")
    for name, vector, wanted in (("magnitude", magnitude, "use_dora"), ("bias", bias, "lora_bias")):
        if bool(vector) != bool(config.get(wanted)):
            raise ResolveError(f"{where}: `{wanted}` is {config.get(wanted)!r} and a {name} is {_there(vector)}")
        if vector and (vector.shape != (B_OR.shape[0],) or vector.dtype not in STORAGE):
            raise ResolveError(f"{where}: its {name} is {vector.dtype} {list(vector.shape)}, not [{B_OR.shape[0]}]")
    if embedding and magnitude:
        raise ResolveError(f"{where}: DoRA on an embedding cannot be applied exactly yet")
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    transposed = embedding or config.get("fan_in_fan_out") is True
    return Target(module, rank, alpha, scale, A_RI, B_OR, transposed, magnitude, bias, embedding)


def _there(entry: TensorEntry | None) -> str:
    return "there" if entry else "missing; the patch is damaged"


def _by_pattern(directory: Path, config: Mapping[str, Any], field: str, module: str, default: Any) -> Any:
    """The value of `rank_pattern` or `alpha_pattern` for a module: the first key that ends its name, as in PEFT."""
    for pattern, value in (config.get(field) or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except (re.error, OverflowError, RecursionError) as error:
            raise ResolveError(f"{directory / CONFIG}: `{field}` holds {pattern!r}, no pattern ({error})") from error
    return default


def stored_name(name: str, tensors: Mapping[str, TensorEntry]) -> str | None:
    """The stored tensor that a parameter is loaded from.

    A checkpoint of the bare model lacks the head model's prefix (`transformer.`, `model.`) on every name, and
    transformers adds it on loading: so does this. So do `RENAMED`'s prefixes.
    """
    if name in tensors:
        return name
    prefix, _, bare = name.partition(".")
    if bare in tensors and not any(other.startswith(f"{prefix}.") for other in tensors):
        return bare
    others = (stored + name.removeprefix(loaded) for loaded, stored in RENAMED if name.startswith(loaded))
    return next((other for other in others if other in tensors), None)


def check_fits(adapter: Adapter, tensors: Mapping[str, TensorEntry], tied: bool = False) -> list[Mismatch]:
    """Every part that does not fit a model's tensors. `tied`: the model's head is its embedding."""
    wanted: list[tuple[str, str, tuple[int, ...]]] = []
    for module, target in adapter.targets.items():
        wanted.append((module, f"{module}.weight", target.stored_shape))
        if target.bias:
            wanted.append((module, f"{module}.bias", target.bias.shape))
    wanted += [(name, name, entry.shape) for name, entry in {**adapter.replaced, **adapter.copies}.items()]
    checked = ((what, _misfit(name, shape, tensors, tied)) for what, name, shape in wanted)
    return [Mismatch(what, reason) for what, reason in checked if reason is not None]


def require_fits(adapter: Adapter, tensors: Mapping[str, TensorEntry], tied: bool = False) -> None:
    """Raises `ResolveError` with the first mismatch and how many more there are."""
    if mismatches := check_fits(adapter, tensors, tied):
        first, more = mismatches[0], len(mismatches) - 1
        others = f" (and {more} more of {len(adapter.targets)} targets do not fit)" if more else ""
        raise ResolveError(f"{adapter.directory}: patch targets `{first.module}`, {first.reason}{others}")


def _misfit(name: str, wanted: tuple[int, ...], tensors: Mapping[str, TensorEntry], tied: bool) -> str | None:
    module, _, kind = name.rpartition(".")
    if tied and kind == "weight" and module.rpartition(".")[2] in (*HEADS, *EMBEDDINGS):
        return "the version ties head and embeddings: untie them first (--untie), or train the patch without it"
    stored = stored_name(name, tensors)
    if stored is None:
        return f"the version has no {kind} there" if kind == "bias" else _why_absent(module, tensors)
    entry = tensors[stored]
    if entry.dtype not in STORAGE:
        return f"the version stores it as {entry.dtype}: patches are added to {', '.join(STORAGE.values())} only"
    if entry.shape == wanted:
        return None
    if len(wanted) == 2 and entry.shape == wanted[::-1]:
        return f"the version stores it transposed: fan_in_fan_out in {CONFIG} should be the other way round"
    shapes = f"the version's {kind} is {_times(entry.shape)}, the patch's {_times(wanted)}"
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


def ties_embeddings(config: Mapping[str, Any], names: Iterable[str]) -> bool:
    """Whether the head is the embedding: the config says so, or the files hold no head."""
    return config.get("tie_word_embeddings") is True or not any(last_part(name) in HEADS for name in names)


def last_part(name: str) -> str:
    """Last part of the module a tensor belongs to."""
    return name.rpartition(".")[0].rpartition(".")[2]
