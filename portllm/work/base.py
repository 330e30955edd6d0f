"""θ₀ as a model directory: initialised and pretrained here, fetched from the hub, or dequantised from a GGUF file."""

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from portllm.errors import StageError
from portllm.formats.dropout import dropouts
from portllm.formats.text import documents
from portllm.study.recipes import Base, Optimization, Text
from portllm.work.batches import packed, update_batches
from portllm.work.context import RunContext, Summary
from portllm.work.corpora import tokenise, without
from portllm.work.hub import snapshot
from portllm.work.lora import check_saved
from portllm.work.training import Whole, seed_everything, train

SHARD = "2GB"
"""Largest weight file."""
SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
WORDS = r" ?[\p{L}\p{N}']+| ?[^\s\p{L}\p{N}']+|\s+(?!\S)|\s+"
"""A word, or a run of punctuation, takes the blank before it: a text is the concatenation of its words, and those of
context + continuation are the context's, then the continuation's."""


def base(recipe: Base, inputs: Mapping[str, Path], out: Path, run: RunContext) -> Summary:
    """Stage `base`: a model directory with tokenizer and generation config."""
    makers = {"init": initialise, "hub": fetch, "gguf": dequantise}
    return makers[recipe.source](recipe, inputs, out, run)


# ---------------------------------------------------------------------------------------------------------------- init


def initialise(recipe: Base, inputs: Mapping[str, Path], out: Path, run: RunContext) -> Summary:
    """A tokenizer trained on the text, and a model pretrained on it from a seeded start."""
    _, optimization = required(recipe)
    tokenizer = train_tokenizer(recipe, (document for _, document in kept(recipe, inputs)))
    model = fresh_model(recipe, tokenizer, optimization.seed)
    ledger = pretrain(recipe, model, tokenizer, inputs, out, run)
    if run.rank == 0:
        tokenizer.save_pretrained(out)
        save(model, out)
    return ledger | {"vocabulary": len(tokenizer)}


def required(recipe: Base) -> tuple[Text, Optimization]:
    if recipe.text is None or recipe.optimization is None or recipe.model_type is None:
        raise StageError("`init` needs an architecture (`model_type`), a corpus (`text`) and an `optimization`")
    return recipe.text, recipe.optimization


def train_tokenizer(recipe: Base, texts: Iterator[str]) -> Any:
    """A fast tokenizer of at most `vocabulary` tokens, loaded by AutoTokenizer; it adds no special token itself."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = list(SPECIAL.values())
    limits: dict[str, Any] = {"vocab_size": recipe.vocabulary, "special_tokens": special, "show_progress": False}
    if recipe.tokenizer == "word":
        inner = Tokenizer(models.WordLevel(unk_token=SPECIAL["unk_token"]))
        # The first word gets a blank like every other, unless the text begins with white space already.
        blank = [normalizers.Prepend(" "), normalizers.Replace(Regex(r"^ (?=\s)"), "")]
        inner.normalizer = normalizers.Sequence(blank)
        inner.pre_tokenizer = pre_tokenizers.Split(Regex(WORDS), "isolated")
        inner.decoder = decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 1, 0)])
        trainer: Any = trainers.WordLevelTrainer(**limits)
    else:
        inner = Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **limits)
    inner.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, clean_up_tokenization_spaces=False, **SPECIAL)


def fresh_model(recipe: Base, tokenizer: Any, seed: int) -> Any:
    """The architecture with seeded initial weights, in fp32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    options = {"vocab_size": len(tokenizer), **ids, **recipe.config}
    try:
        config = AutoConfig.for_model(str(recipe.model_type), **options)
        leave_out_dropout(config, recipe.config)
        seed_everything(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (ValueError, TypeError, KeyError) as error:
        raise StageError(f"no model of type `{recipe.model_type}` can be made from `config`: {error}") from error


def leave_out_dropout(config: Any, stated: Mapping[str, Any]) -> None:
    """Writes 0 where only transformers' own defaults ask for dropout (0.1 for GPT-2): no training here has any."""
    text = config.get_text_config()
    for name in dropouts(text.to_dict()).keys() - stated.keys():
        setattr(text, name, 0.0)


def pretrain(
    recipe: Base, model: Any, tokenizer: Any, inputs: Mapping[str, Path], out: Path, run: RunContext
) -> Summary:
    """Trains all weights on the first `tokens` tokens of the shuffled text; the model ends in the storage dtype."""
    text, optimization = required(recipe)
    storage = getattr(torch, recipe.storage)
    if recipe.tokens == 0:
        model.to(storage)
        return {"tokens": 0}
    run.scratch.mkdir(parents=True, exist_ok=True)
    # NFS keeps files that are still mapped under other names, and their directory, until this process closes them.
    with tempfile.TemporaryDirectory(dir=run.scratch, ignore_cleanup_errors=True) as directory:
        tokenise(kept(recipe, inputs), tokenizer, text.seed, Path(directory), run.scratch)
        data = packed(Path(directory), 0, recipe.tokens, recipe.sequence_length)
        batches = update_batches(len(data), optimization.batch, optimization.seed)
        return train(model.to(run.device), data, batches, optimization, "full", run, out, Whole(storage))


def kept(recipe: Base, inputs: Mapping[str, Path]) -> Iterator[tuple[int, str]]:
    """The text's documents without the excluded ones, with their row numbers."""
    numbered = enumerate(documents(required(recipe)[0], inputs.get("source")))
    return iter(without(numbered, frozenset(recipe.excluded), frozenset(), []))


def save(model: Any, out: Path) -> None:
    """Weights in shards, config and generation config; refuses an empty or non-finite tensor."""
    model.save_pretrained(out, max_shard_size=SHARD)
    for file in out.glob("*.safetensors"):
        check_saved(file)


# --------------------------------------------------------------------------------------------------------- hub and GGUF


def fetch(recipe: Base, inputs: Mapping[str, Path], out: Path, run: RunContext) -> Summary:
    """A snapshot of a hub repository at one commit: safetensors, configuration, tokenizer."""
    if recipe.hub is None or recipe.revision is None:
        raise StageError("a model from the hub needs its id and the full commit sha (`portllm lock` finds it)")
    snapshot(recipe.hub, recipe.revision, out)
    shutil.rmtree(out / ".cache", ignore_errors=True)
    return {"bytes": sum(f.stat().st_size for f in out.iterdir())}


def dequantise(recipe: Base, inputs: Mapping[str, Path], out: Path, run: RunContext) -> Summary:
    """A GGUF file as a normal model, once: without `dequantize` transformers keeps weights packed, and unsaveable."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    file, storage = inputs["source"], getattr(torch, recipe.storage)
    place: dict[str, Any] = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**place)
        packing = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(**place, quantization_config=packing, dtype=storage)
    except ImportError as error:
        raise StageError(f"reading {file.name} needs the package `gguf`: pip install gguf") from error
    model.config.name_or_path = ""
    leave_out_dropout(model.config, {})  # a GGUF file states none
    tokenizer.save_pretrained(out)
    save(model.to(storage), out)
    return {"total_parameters": model.num_parameters()}
