"""A version in memory: patches applied to it and taken off again, the weights afterwards as before to the bit.

Nothing is ever subtracted, and no loaded weight is written to: `merged` puts another tensor in a parameter's place,
`adapter` another module in a layer's place, and leaving the block puts the first one back.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from portllm.errors import ResolveError, StageError
from portllm.formats.adapter import Adapter, stored_name, ties_embeddings
from portllm.formats.tensors import TensorEntry, model_tensors, read_json, storage_dtype
from portllm.work.changes import Applied, Patches, read_patches, touched
from portllm.work.patches import DTYPES, add, read_tensor, require_same_copies

_EVALUATION = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Resident:
    """One version's weights in this process."""

    def __init__(self, path: Path, dtype: str, device: str = "cpu") -> None:
        """Loads the model directory `path`; `StageError` where its weights are incomplete."""
        self.path = path
        """Complete model directory: the version's bits."""
        self.device = device
        self._tensors = model_tensors(path)
        self._tied = ties_embeddings(read_json(path / "config.json"), self._tensors)
        self.storage: torch.dtype = getattr(torch, storage_dtype(self._tensors))
        """Storage dtype D of the version."""
        self.model = _load(path, _EVALUATION[dtype]).to(device)
        """In eval mode, on `device`."""
        self._state = self._fingerprint()
        self._busy = False

    def stored_dtype(self, name: str) -> torch.dtype:
        """The dtype of a parameter in the version's files; the version's own where it lies in none by itself."""
        stored = stored_name(name, self._tensors)
        return DTYPES[self._tensors[stored].dtype] if stored else self.storage

    def in_files(self, name: str) -> bool:
        """Whether a parameter's bits can be read again."""
        return stored_name(name, self._tensors) is not None

    def stored_bits(self, name: str) -> torch.Tensor | None:
        """A parameter's own bits, fp32, where the model's dtype does not hold them.

        One that transformers renames or fuses on loading lies in no file by its name: the model is loaded once more.
        """
        stored = stored_name(name, self._tensors)
        if self.model.get_parameter(name).dtype in (torch.float32, self.stored_dtype(name)):
            return None
        if stored is None:
            return self._as_stored.get_parameter(name).detach().float()
        return read_tensor(self._tensors[stored]).float()

    @cached_property
    def _as_stored(self) -> Any:
        return _load(self.path, self.storage)

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.path, local_files_only=True)

    @contextmanager
    def applied(self, patches: Patches, mode: Literal["merged", "adapter"] = "merged") -> Iterator[torch.nn.Module]:
        """The model with patches (directory, λ) added in order, for the length of the block.

        `merged`: each touched weight is round_D(W_D + Σ λΔW), then cast to the model's dtype: the bits `apply` and
        `export` write. `adapter`: PEFT's layers, the patches kept apart in the forward pass. Raises `ResolveError`
        before anything is changed where a patch does not fit.
        """
        if self._busy:
            raise StageError(f"{self.path}: patches are applied already; leave that block first")
        adapters = read_patches(patches, self._tensors, self._tied)
        require_same_copies(adapters, self._tensors)
        self._busy = True
        try:
            with self._merged(adapters) if mode == "merged" else self._kept_apart(adapters):
                yield self.model
        finally:
            self._busy = False

    def untouched(self) -> bool:
        """Whether modules and weights are the ones that were loaded (the same tensors, never written to)."""
        return not self._busy and self._fingerprint() == self._state

    def reset(self) -> None:
        """Undoes what a training may leave behind without changing a weight."""
        self.__dict__.pop("_as_stored", None)
        self.model.eval()
        for parameter in self.model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
            parameter.grad = None

    def _fingerprint(self) -> tuple[Any, ...]:
        """Every module's name and type, and every parameter's storage and count of in-place writes."""
        modules = tuple((name, type(module)) for name, module in self.model.named_modules())
        weights = tuple((name, p.data_ptr(), p._version, p.dtype) for name, p in self.model.named_parameters())
        return modules, weights

    @contextmanager
    def _merged(self, adapters: list[Applied]) -> Iterator[None]:
        changes = touched(adapters, self._tensors)
        parameters = {name: self._parameter(name) for name in changes}
        saved: list[tuple[torch.nn.Parameter, torch.Tensor]] = []
        try:
            for name, parameter in parameters.items():
                entry = self._tensors[name]
                W = add(self._stored(parameter, entry), changes[name], DTYPES[entry.dtype])
                saved.append((parameter, parameter.data))
                parameter.data = W.to(device=parameter.device, dtype=parameter.dtype)
            yield
        finally:
            for parameter, W in saved:
                parameter.data = W

    @cached_property
    def _loaded(self) -> dict[str, str]:
        """Names in memory by names in the files."""
        names = (name for name, _ in self.model.named_parameters(remove_duplicate=False))
        return {stored: name for name in names if (stored := stored_name(name, self._tensors))}

    def _stored(self, parameter: torch.nn.Parameter, entry: TensorEntry) -> torch.Tensor:
        """The version's own bits of a weight: from memory where the model's dtype holds them, else from its file."""
        holds = parameter.dtype in (torch.float32, DTYPES[entry.dtype])
        return parameter.data if holds and parameter.device.type == "cpu" else read_tensor(entry)

    def _parameter(self, stored: str) -> torch.nn.Parameter:
        """The parameter in memory that a stored tensor becomes, a tensor of its own."""
        if stored not in self._loaded:
            raise ResolveError(
                f"{self.path}: transformers loads no `{stored}`: it renames or fuses this architecture's layers, and a "
                "patch on them cannot be applied exactly yet"
            )
        parameter = self.model.get_parameter(self._loaded[stored])
        shared = [name for name, p in self.model.named_parameters(remove_duplicate=False) if p is parameter]
        if len(shared) > 1:
            raise ResolveError(f"{self.path}: `{shared[0]}` and `{shared[1]}` are one weight; untie them to patch one")
        return parameter

    @contextmanager
    def _kept_apart(self, adapters: list[Applied]) -> Iterator[None]:
        trained = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        try:
            self._inject(adapters)
            yield
        finally:
            _remove_adapters(self.model)
            for parameter, flag in trained:
                parameter.requires_grad_(flag)

    def _inject(self, adapters: list[Applied]) -> None:
        """PEFT's own loading: factors in fp32, all patches active, each at λ times its scale."""
        from peft import PeftModel

        wrapped: Any = None
        names = [f"patch{index}" for index in range(1, len(adapters) + 1)]
        for name, (adapter, scale) in zip(names, adapters, strict=True):
            where = str(adapter.directory)
            require_removable(adapter)
            if wrapped is None:
                with warnings.catch_warnings():  # of transformers, that PEFT asks by an old name
                    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
                    wrapped = PeftModel.from_pretrained(self.model, where, adapter_name=name, torch_device=self.device)
            else:
                wrapped.load_adapter(where, adapter_name=name, torch_device=self.device)
            layers = {path: layer for path, layer in _lora_layers(self.model).items() if name in layer.scaling}
            if set(layers) != set(adapter.targets):
                odd = min(set(layers) ^ set(adapter.targets))
                raise ResolveError(f"{where}: `{odd}` is in only one of its tensors and its target_modules")
            for layer in layers.values():
                layer.scaling[name] *= scale
        if wrapped is not None:
            wrapped.base_model.set_adapter(names)


def require_removable(adapter: Adapter) -> None:
    """Refuses a patch whose whole tensors PEFT would write over the model's own, for mode `adapter`."""
    if whole := {**adapter.replaced, **adapter.copies}:
        raise ResolveError(f"{adapter.directory}: replaces `{min(whole)}`, which mode adapter cannot undo: use merged")


def _load(path: Path, dtype: torch.dtype) -> Any:
    """transformers' model, every weight from the files (a missing one would be drawn at random, with a warning)."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, local_files_only=True, output_loading_info=True
    )
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise StageError(f"{path}: lacks {len(missing)} weights of {type(model).__name__}, `{missing[0]}` among them")
    return model.eval()


def _lora_layers(model: torch.nn.Module) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def _remove_adapters(model: torch.nn.Module) -> None:
    """Every LoRA layer gives its place back to the layer it wraps."""
    for name, layer in _lora_layers(model).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    model.__dict__.pop("peft_config", None)
