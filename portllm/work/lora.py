"""LoRA in training: attached to a private copy of a version, saved by PEFT, checked before they count."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from portllm.errors import StageError
from portllm.study.recipes import Lora
from portllm.study.resources import Trains
from portllm.work.resident import Resident
from portllm.work.training import seed_everything


def private_copy(model: nn.Module, trains: Trains) -> Any:
    """A copy of a resident model to train. Under LoRA it shares the memory of the weights, which stay frozen.

    Weights that do not begin on a 64-byte boundary are copied: last bits of a product may depend on it, and a training
    must not depend on how its version came into memory.
    """
    shared: dict[int, Any] = {}
    if trains == "lora":
        frozen = [p for p in model.parameters() if p.data_ptr() % 64 == 0]
        shared = {id(p): nn.Parameter(p.data, requires_grad=False) for p in frozen}
    mine = copy.deepcopy(model, shared)
    return mine.requires_grad_(trains == "full")


def attach(model: Any, lora: Lora, seed: int) -> Any:
    """`model` as a PEFT model with a fresh LoRA, its initial values fixed by the seed alone.

    Raises StageError for a target that matches no module.
    """
    import peft

    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,  # type: ignore[arg-type]
        target_modules=lora.targets if isinstance(lora.targets, str) else list(lora.targets),
        exclude_modules=_beside_text(model),
        task_type="CAUSAL_LM",
    )
    seed_everything(seed)
    check_targets(model, lora.targets)
    try:
        return peft.get_peft_model(model, config)
    except ValueError as error:
        raise StageError(f"LoRA targets {lora.targets!r} do not fit `{model.config.model_type}`: {error}") from error


def _beside_text(model: Any) -> str | None:
    """A pattern of all that no token passes: what a model with vision or hearing has beside its decoder."""
    if model.config.get_text_config() is model.config:
        return None
    decoder = next(name for name, module in model.named_modules() if module is model.get_decoder())
    return rf"(?!{re.escape(decoder)}\.).*"


def go_on(model: Any, patch: Path) -> Any:
    """`model` as a PEFT model with a patch's own LoRA, to be trained further."""
    import peft

    return peft.PeftModel.from_pretrained(model, str(patch), is_trainable=True)


def require_applicable(adapted: Any, resident: Resident) -> None:
    """Refuses, before anything is trained, a LoRA whose changes no stored tensor could take up.

    transformers 5 keeps the experts of Mixtral and its like in one parameter, and PEFT's `all-linear` means those too.
    """
    from peft.tuners.lora import LoraLayer

    kind = adapted.config.model_type
    for config in adapted.peft_config.values():
        if experts := getattr(config, "target_parameters", None):
            plain = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in config.target_modules}))
            raise StageError(
                f"LoRA on `{kind}` targets {', '.join(sorted(experts))}: whole stacks of experts, to which a patch "
                f"cannot be applied yet; give targets: [{plain}]"
            )
    for name, module in adapted.get_base_model().named_modules():
        if isinstance(module, LoraLayer) and not resident.in_files(f"{name}.weight"):
            raise StageError(
                f"LoRA on `{kind}` targets `{name}`, and {resident.path} stores no `{name}.weight`: transformers "
                f"renames, fuses or ties it, and a patch on it cannot be applied exactly; give targets without it"
            )


def check_targets(model: Any, targets: str | tuple[str, ...]) -> None:
    """PEFT is silent about a target that matches nothing as long as another matches."""
    names = [name for name, _ in model.named_modules()]
    for target in () if isinstance(targets, str) else targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            linear = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
            raise StageError(f"LoRA target `{target}` matches no module; linear modules here: {', '.join(linear)}")


def save_adapter(model: Any, out: Path) -> None:
    """The adapter as PEFT writes it, without traces of this machine. Raises StageError for a tensor that is no use."""
    for config in model.peft_config.values():
        config.base_model_name_or_path = ""
    # save_embedding_layers: PEFT's "auto" asks the hub for the base model's config.
    model.save_pretrained(out, safe_serialization=True, save_embedding_layers=False)
    (out / "README.md").unlink(missing_ok=True)
    config_file = out / "adapter_config.json"
    settings = json.loads(config_file.read_text())
    if isinstance(settings["target_modules"], list):
        settings["target_modules"].sort()  # a set in PEFT: its order changes from process to process
    config_file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    check_saved(out / "adapter_model.safetensors")


def check_saved(path: Path) -> None:
    """Every tensor of a file holds numbers, all of them finite (ZeRO-3 is known to save empty ones)."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        if not names:
            raise StageError(f"{path.name} holds no tensor: nothing was trained")
        for name in names:
            tensor = file.get_tensor(name)
            if tensor.numel() == 0 or not bool(torch.isfinite(tensor).all()):
                what = "is empty" if tensor.numel() == 0 else "holds a value that is not finite"
                raise StageError(f"tensor `{name}` of {path.name} {what}: lower `learning_rate`, or use `zero: 2`")
