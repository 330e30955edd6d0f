"""Whether a patch belongs on a model, before anything is written: every doubt in one list, worst first."""

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from portllm.errors import ResolveError
from portllm.formats.adapter import Adapter, check_fits, read_adapter, ties_embeddings
from portllm.formats.tensors import TOKENIZER_FILES, TensorEntry, model_tensors, read_json, sha256, storage_dtype
from portllm.work.provenance import provenance

_SAME_TOKENS = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "spiece.model")
"""Files that say which token is which; settings and templates may differ."""


Kind = Literal["mismatch", "warning", "note"]
"""A mismatch refuses the patch; a warning and a note do not."""


@dataclass(frozen=True)
class Finding:
    """One thing found."""

    kind: Kind
    what: str
    """Module, file or field."""
    reason: str


@dataclass(frozen=True)
class Verdict:
    """What `check` says."""

    fits: bool
    findings: list[Finding]
    targets: int
    ranks: list[int]
    patch_dtypes: list[str]
    model_dtype: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def check(model: Path, patch: Path) -> Verdict:
    """Everything that can be known without a forward pass. Raises `ResolveError` where one of the two is unreadable."""
    tensors = model_tensors(model)
    adapter = read_adapter(patch)
    config = read_json(model / "config.json")
    findings = [
        Finding("mismatch", m.module, m.reason) for m in check_fits(adapter, tensors, ties_embeddings(config, tensors))
    ]
    fits = not findings
    findings += _factors(adapter, storage_dtype(tensors))
    findings += _copies(adapter, tensors) if fits else []
    findings += _origin(adapter, model, patch)
    findings += _lineage(model, patch) if fits else []
    return Verdict(
        fits=not any(finding.kind == "mismatch" for finding in findings),
        findings=sorted(findings, key=lambda finding: get_args(Kind).index(finding.kind)),
        targets=len(adapter.targets),
        ranks=sorted({target.rank for target in adapter.targets.values()}),
        patch_dtypes=sorted({target.A_RI.dtype for target in adapter.targets.values()}),
        model_dtype=storage_dtype(tensors),
    )


def _factors(adapter: Adapter, storage: str) -> Iterator[Finding]:
    """Values: finite, and not all zero in B (then the patch was never trained)."""
    import torch

    dtype = getattr(torch, storage)

    from portllm.work.patches import read_tensor

    idle = []
    for module, target in adapter.targets.items():
        A_RI, B_OR = read_tensor(target.A_RI).float(), read_tensor(target.B_OR).float()
        others = [read_tensor(entry) for entry in (target.magnitude, target.bias) if entry is not None]
        if not all(torch.isfinite(part).all() for part in (A_RI, B_OR, *others)):
            yield Finding("mismatch", module, "its factors hold NaN or infinity; the patch is damaged")
        elif not B_OR.any():
            idle.append(module)
        elif not torch.isfinite((B_OR.abs().max() * A_RI.abs().max() * target.rank * abs(target.scale)).to(dtype)):
            yield Finding("warning", module, f"may overflow {str(dtype).removeprefix('torch.')}: its factors are huge")
    for name, entry in adapter.replaced.items():
        if not torch.isfinite(read_tensor(entry)).all():
            yield Finding("mismatch", name, "holds NaN or infinity; the patch is damaged")
    if idle and len(idle) == len(adapter.targets):
        yield Finding("warning", "lora_B", "is zero everywhere: the patch changes nothing")
    elif idle:
        yield Finding("warning", idle[0], f"and {len(idle) - 1} more modules have a zero lora_B: they change nothing")


def _copies(adapter: Adapter, tensors: Mapping[str, TensorEntry]) -> Iterator[Finding]:
    from portllm.work.patches import require_same_copies

    try:
        require_same_copies([(adapter, 1.0)], tensors)
    except ResolveError as error:
        yield Finding("mismatch", min(adapter.copies), str(error).removeprefix(f"{adapter.directory}: "))


def _origin(adapter: Adapter, model: Path, patch: Path) -> Iterator[Finding]:
    """What the patch says of its base, and the tokenizer it came with."""
    if adapter.base and Path(adapter.base).name not in (model.name, model.resolve().name):
        yield Finding("warning", "base_model_name_or_path", f"names {adapter.base}: another version, or model")
    for name in TOKENIZER_FILES:
        mine, theirs = patch / name, model / name
        if name in _SAME_TOKENS and mine.is_file() and theirs.is_file() and _meaning(mine) != _meaning(theirs):
            yield Finding("warning", name, "differs between patch and model: the same text may give other tokens")


def _meaning(file: Path) -> object:
    """What a tokenizer's file says, however it is laid out."""
    return read_json(file) if file.suffix == ".json" else sha256(file)


def _lineage(model: Path, patch: Path) -> Iterator[Finding]:
    """The version the patch was trained on, by its digest, and where it stands in the model's lineage."""
    source = (provenance(patch) or {}).get("source")
    if not isinstance(source, dict) or not isinstance(digest := source.get("sha256"), str):
        return
    from portllm.work.versions import identify

    with tempfile.TemporaryDirectory() as scratch:
        own, before = identify({"root": model}, Path(scratch))
    if digest == own:
        yield Finding("note", "source version", "is this very model: the patch was trained on it")
    elif digest in before:
        updates = len(before) - before.index(digest)
        yield Finding("note", "source version", f"is {updates} update{'s' * (updates > 1)} before this one")
    elif own in (after if isinstance(after := source.get("lineage"), list) else []):
        yield Finding("warning", "source version", "is later than this model: the patch would go back in time")
    else:
        yield Finding(
            "warning", "source version", f"{digest[:12]}… is not known to come before this model ({own[:12]}…)"
        )
