"""Models, given versions and adapters: what they are, by reading headers and configurations only."""

import re
from collections.abc import Mapping
from pathlib import Path

from portllm.errors import ResolveError
from portllm.formats import adapter, tensors
from portllm.formats.dropout import dropouts
from portllm.resolve import shapes
from portllm.resolve.source import Sources, about
from portllm.study.facts import Given, ModelFacts, PatchFacts
from portllm.study.spec import Model

_SHA = re.compile(r"[0-9a-f]{40}")


def pinned(revision: str | None) -> bool:
    """Whether a revision is a full commit sha."""
    return bool(revision and _SHA.fullmatch(revision))


def directory_facts(path: Path, sources: Sources) -> ModelFacts:
    """A model directory: its digest, its tokenizer's, its shape and storage dtype."""
    entries = tensors.model_tensors(path)
    config = shapes.load_config(path / "config.json")
    storage = tensors.storage_dtype(entries)
    files = tensors.content_files(path)
    tokenizer = [f for f in files if f.name in tensors.TOKENIZER_FILES]
    if not tokenizer:
        raise ResolveError(f"{path}: a model directory without a tokenizer (tokenizer.json or tokenizer.model)")
    return ModelFacts(
        root=sources.given("model", path, [f for f in files if f not in tokenizer]),
        tokenizer=sources.given("tokenizer", path, tokenizer),
        shape=shapes.from_tensors({n: e.shape for n, e in entries.items()}, config, storage),
        storage=storage,
        dropout=dropouts(config),
    )


def model_facts(name: str, model: Model, sources: Sources) -> ModelFacts:
    """A model of the study."""
    if model.path:
        directory = sources.directory(model.path, f"models.{name}.path")
        with about(f"models.{name}.path"):
            return directory_facts(directory, sources)
    config = _configuration(name, model, sources)
    storage = model.dtype or ("float32" if model.init else "bfloat16")
    shape = shapes.from_config(config, storage)
    if model.gguf:  # such a file states no dropout
        return ModelFacts(None, None, source=_gguf(name, model.gguf, sources), shape=shape, storage=storage)
    return ModelFacts(None, None, shape=shape, storage=storage, dropout=dropouts(config))


def _gguf(name: str, path: str, sources: Sources) -> Given:
    file = sources.file(path, f"models.{name}.gguf", mend="`make gemma` fetches the one the examples use")
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise ResolveError(f"models.{name}.gguf: {file} is not a GGUF file")
    return sources.given("gguf", file, [file])


def _configuration(name: str, model: Model, sources: Sources) -> Mapping[str, object]:
    """A model's configuration before a run: the one named, the one that ships, or `init`'s own; empty where unknown."""
    if model.init:
        return {
            **_defaults(model.init.config),
            "model_type": model.init.model_type,
            "vocab_size": model.init.vocabulary,
        }
    if not model.shape:
        return {}
    return shapes.load_config(shapes.shipped(model.shape) or sources.file(model.shape, f"models.{name}.shape"))


def _defaults(config: Mapping[str, object]) -> dict[str, object]:
    hidden = config.get("hidden_size", 0)
    return {"num_attention_heads": 1, "intermediate_size": hidden, "num_hidden_layers": 0, **config}


def version_facts(where: str, path: str, base: ModelFacts, sources: Sources) -> ModelFacts:
    """A given version: a model directory with the base's tensor names and shapes."""
    directory = sources.directory(path, where)
    with about(where):
        facts = directory_facts(directory, sources)
    if facts.tokenizer and base.tokenizer and facts.tokenizer.key != base.tokenizer.key:
        raise ResolveError(f"{where}: its tokenizer differs from that of {base.tokenizer.path}: not a version of it")
    if base.root is not None:
        _require_same(where, directory, Path(base.root.path))
    return facts


def _require_same(where: str, version: Path, base: Path) -> None:
    ours = {n: e.shape for n, e in tensors.model_tensors(version).items()}
    theirs = {n: e.shape for n, e in tensors.model_tensors(base).items()}
    for name in sorted(ours.keys() ^ theirs.keys()):
        holder = version if name in ours else base
        raise ResolveError(f"{where}: only {holder} has tensor `{name}`: it is not a version of {base}")
    for name, shape in ours.items():
        if shape != theirs[name]:
            raise ResolveError(f"{where}: tensor `{name}` is {shape}, in {base} {theirs[name]}: not a version of it")


def patch_facts(where: str, path: str, models: Mapping[str, ModelFacts], sources: Sources) -> PatchFacts:
    """A PEFT adapter that must fit every model it is meant for."""
    directory = sources.directory(path, where)
    with about(where):
        read = adapter.read_adapter(directory)
    for name, facts in models.items():
        if facts.root is not None:
            with about(f"{where}: {directory} does not fit model `{name}`"):
                root = Path(facts.root.path)
                stored, config = tensors.model_tensors(root), tensors.read_json(root / "config.json")
                adapter.require_fits(read, stored, adapter.ties_embeddings(config, stored))
    ranks = sorted({t.rank for t in read.targets.values()}, reverse=True)
    given = sources.given("patch", directory, tensors.content_files(directory))
    return PatchFacts(given, rank=ranks[0], dropout=read.dropout)
