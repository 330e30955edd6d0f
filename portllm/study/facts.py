"""What `resolve` found out about the things a study names: plain values, so that planning is pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from portllm.study.recipes import Dtype, Format


@dataclass(frozen=True)
class Given:
    """Something a user handed in, used where it lies. Its key is made from its content digest."""

    key: str
    path: str
    """Absolute."""
    what: str
    """model, tokenizer, patch, corpus, data, definition or gguf."""


@dataclass(frozen=True)
class Shape:
    """A model's sizes, from its safetensors headers or its configuration."""

    parameters: int
    """A tied head counts once, as the embedding."""
    linear: tuple[tuple[int, int], ...] = ()
    """(out, in) of every linear module that `all-linear` targets."""
    modules: tuple[str, ...] = ()
    """Last parts of the names a LoRA may target, sorted; empty where they are unknown."""
    layers: int = 0
    hidden: int = 0
    vocabulary: int = 0
    tied: bool = False
    """Whether the head is the embedding."""
    norms: int = 0
    """Widths of all norms, added up."""
    max_positions: int = 0
    """Longest sequence; 0 where unknown."""
    storage: Dtype = "float32"

    @property
    def head(self) -> int:
        """Weights of the head, and as many of the embedding."""
        return self.vocabulary * self.hidden

    @property
    def body(self) -> int:
        """Weights that every token passes: neither the embedding, where it is looked up, nor the head."""
        return self.parameters - self.head * (1 if self.tied else 2)

    def lora_parameters(self, rank: int) -> int:
        """Trainable parameters of a rank-r LoRA over all linear modules: Σ r·(in + out)."""
        return sum(rank * (rows + columns) for rows, columns in self.linear)


@dataclass(frozen=True)
class ModelFacts:
    """A model or a given version."""

    root: Given | None
    """The directory, where it is used as it lies (path)."""
    tokenizer: Given | None
    """Its tokenizer's files, where they are known before a run."""
    source: Given | None = None
    """The GGUF file."""
    shape: Shape | None = None
    """None where nothing is known offline."""
    storage: Dtype = "float32"
    dropout: Mapping[str, float] = field(default_factory=dict)
    """Dropouts that its configuration states and that are not 0, by field."""


@dataclass(frozen=True)
class CorpusFacts:
    """A corpus."""

    source: Given | None
    format: Format | None = None
    rows: int | None = None
    excluded: tuple[int, ...] = ()
    """Rows that hold an evaluated prompt of one of the study's tasks."""
    most_tokens: int | None = None
    """A token holds at least a byte: no tokenizer makes more of the documents. None where they were not read yet."""
    screened: bool = True
    """False for a hub corpus: it is screened when it is read."""


@dataclass(frozen=True)
class TaskFacts:
    """An lm-eval task with its data."""

    definition: Given | None
    data: Given | None
    config: str = ""
    """Digest of its YAML, of what it includes and of its functions."""
    dataset: str | None = None
    """Hub data set `path:subset` where no data are given."""
    revision: str | None = None
    output_type: str = "multiple_choice"
    metric: str = "acc"
    documents: int | None = None
    """Evaluated documents, before a limit; None where the hub holds them."""
    training: int | None = None
    """Training documents."""
    num_fewshot: int = 0
    choices: int = 1
    new_tokens: int = 0
    """Tokens that a generated text may have; 0 where nothing is generated."""
    template: str = ""
    """doc_to_text: tasks that share it could leak into each other's training."""


@dataclass(frozen=True)
class PatchFacts:
    """A PEFT adapter that exists already."""

    root: Given
    rank: int
    parameters: int = 0
    dropout: float = 0.0
    """Its `lora_dropout`."""


@dataclass(frozen=True)
class Facts:
    """Everything a plan stands on, by the study's names."""

    lm_eval: str
    models: Mapping[str, ModelFacts]
    corpora: Mapping[str, CorpusFacts]
    tasks: Mapping[str, TaskFacts]
    patches: Mapping[tuple[str, int], PatchFacts] = field(default_factory=dict)
    """By (task, position in the study's list)."""
    versions: Mapping[tuple[str, int], ModelFacts] = field(default_factory=dict)
    """Given versions, by (lineage, position in its updates)."""
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Tasks behind each group or tag that the study names."""
    deepspeed: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """DeepSpeed configurations of the user's own, by stage."""
    unpinned: tuple[str, ...] = ()
    """Hub ids without a commit: the plan has no keys, and `run` refuses it."""
    notes: tuple[str, ...] = ()
    """Things a user should know before a run: rows dropped, few examples."""


def to_json(value: Any) -> Any:
    """Facts as JSON (tuple keys of mappings become `a|b`)."""
    from dataclasses import fields, is_dataclass

    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {"|".join(map(str, k)) if isinstance(k, tuple) else k: to_json(v) for k, v in value.items()}
    return [to_json(v) for v in value] if isinstance(value, (list, tuple)) else value


def from_json(data: Mapping[str, Any]) -> Facts:
    """The inverse of `to_json`."""
    return Facts(
        lm_eval=data["lm_eval"],
        models={k: _model(v) for k, v in data["models"].items()},
        corpora={
            k: CorpusFacts(**{**v, "source": _given(v["source"]), "excluded": tuple(v["excluded"])})
            for k, v in data["corpora"].items()
        },
        tasks={
            k: TaskFacts(**{**v, "definition": _given(v["definition"]), "data": _given(v["data"])})
            for k, v in data["tasks"].items()
        },
        patches={_pair(k): PatchFacts(**{**v, "root": Given(**v["root"])}) for k, v in data["patches"].items()},
        versions={_pair(k): _model(v) for k, v in data["versions"].items()},
        groups={name: tuple(members) for name, members in data["groups"].items()},
        deepspeed=data["deepspeed"],
        unpinned=tuple(data["unpinned"]),
        notes=tuple(data["notes"]),
    )


def _given(value: Mapping[str, Any] | None) -> Given | None:
    return Given(**value) if value else None


def _pair(text: str) -> tuple[str, int]:
    name, _, number = text.rpartition("|")
    return name, int(number)


def _shape(value: Mapping[str, Any]) -> Shape:
    lists = {"linear": tuple((r, c) for r, c in value["linear"]), "modules": tuple(value["modules"])}
    return Shape(**{**value, **lists})


def _model(value: Mapping[str, Any]) -> ModelFacts:
    shape = value["shape"]
    return ModelFacts(
        root=_given(value["root"]),
        tokenizer=_given(value["tokenizer"]),
        source=_given(value["source"]),
        shape=_shape(shape) if shape else None,
        storage=value["storage"],
        dropout=value["dropout"],
    )
