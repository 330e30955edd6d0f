"""What a model and a corpus cannot give, as far as their facts tell: refused while planning, not after an hour."""

from portllm.errors import SpecError
from portllm.study.complaints import did_you_mean
from portllm.study.facts import ModelFacts, PatchFacts
from portllm.study.recipes import Lora


def check_length(length: int, model: ModelFacts | None, field: str) -> None:
    """A sequence longer than the model reads."""
    shape = model.shape if model else None
    if shape and 0 < shape.max_positions < length:
        raise SpecError(f"{field}: {length} tokens, but the model reads at most {shape.max_positions}")


def check_room(task: str, new_tokens: int, window: int) -> None:
    """Generated text that leaves no room for a prompt; lm-eval's HFLM refuses it, too. A window of 0 is unknown."""
    if 0 < window <= new_tokens:
        raise SpecError(
            f"task `{task}`: generation_kwargs ask for up to {new_tokens} new tokens (max_gen_toks), and the model "
            f"reads {window} in all: no room is left for a prompt; give a definition of your own with fewer "
            f"(include_path), or leave the task out"
        )


def check_corpus(name: str, held: int | None, asked: int, field: str) -> None:
    """More tokens than a corpus can hold (`CorpusFacts.most_tokens`)."""
    if held is not None and held < asked:
        raise SpecError(
            f"{field}: {asked:,} tokens of corpus `{name}` are asked for up to here, and its documents hold at "
            f"most {held:,}: ask for fewer, or give a longer corpus"
        )


_MASKS = "a training here has no dropout, whose masks would depend on ranks and micro-batches"


def check_dropout(model: ModelFacts | None, where: str) -> None:
    """A dropout in the configuration of a model that is trained. Evaluation reads none, and asks nothing."""
    if not model or not model.dropout:
        return
    stated = ", ".join(f"`{name}`: {value}" for name, value in model.dropout.items())
    file, mend = "the model's config.json", "give the model as a directory (`path`), and write 0 in its config.json"
    if model.root:
        file, mend = f"{model.root.path}/config.json", "write 0 there (no score changes)"
    raise SpecError(f"{where}: {file} says {stated}, and {_MASKS}: {mend}")


def check_init_dropout(model: ModelFacts, where: str) -> None:
    """A dropout in `init`'s own configuration."""
    if name := next(iter(model.dropout), None):
        raise SpecError(f"{where}.{name}: {model.dropout[name]}, but {_MASKS}: write 0, or leave it out")


def check_patch_dropout(patch: PatchFacts, where: str) -> None:
    """A dropout in an adapter that is trained further (arm `warm`)."""
    if patch.dropout:
        raise SpecError(
            f"{where}: {patch.root.path}/adapter_config.json says `lora_dropout`: {patch.dropout}, and arm warm trains "
            f"this patch further: {_MASKS}: write 0 there (what the patch adds stays the same)"
        )


def check_lora(lora: Lora, model: ModelFacts | None, where: str) -> None:
    """A rank that is no longer low, a target that matches no module."""
    shape = model.shape if model else None
    if shape is None:
        return
    if 0 < shape.hidden < lora.rank:
        raise SpecError(
            f"{where}: rank {lora.rank} is larger than the model's width of {shape.hidden}: no longer low-rank"
        )
    for target in () if isinstance(lora.targets, str) else lora.targets:
        if shape.modules and target.rsplit(".", 1)[-1] not in shape.modules:
            raise SpecError(f"{where}: LoRA target `{target}` matches no module{did_you_mean(target, shape.modules)}")
