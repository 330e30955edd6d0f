"""The study file's fields. Unknown keys are refused; every error names file, line and field.

`load(text, name, overrides)` is the way in. Paths stay as written: `resolve` takes them relative to the study file.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from portllm.errors import SpecError
from portllm.study.complaints import complaint, did_you_mean
from portllm.study.document import Document, Location, override, parse
from portllm.study.recipes import Dtype, Schedule
from portllm.study.values import (
    ApplyMode,
    Arm,
    Count,
    HubId,
    Length,
    Name,
    Rate,
    Seed,
    Seeds,
    Share,
    Targets,
    Text,
    one_or_more,
)


class Strict(BaseModel):
    """Fields as named, nothing else."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)


class Optimizer(Strict):
    """Optimizer fields that every training shares."""

    batch: Count = 16
    """Global batch: packed sequences (updates, pretraining) or examples (fine-tuning)."""
    schedule: Schedule = "cosine"
    warmup: float = Field(0.03, ge=0, lt=1)
    """Share of all optimizer steps."""
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False)
    clip: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Largest gradient norm."""
    dtype: Dtype = "float32"
    """Of compute and frozen weights; whatever trains has fp32 masters."""


class Training(Optimizer):
    """A training that names its learning rate."""

    learning_rate: Rate
    """Peak learning rate."""


class Init(Training):
    """A model from scratch: an architecture, a tokenizer, and pretraining on one of the study's corpora."""

    model_type: str
    """transformers' name of the architecture: mistral, llama, gemma2, …"""
    config: dict[str, Any] = {}
    """Arguments of its configuration class: hidden_size, num_hidden_layers, …"""
    tokenizer: Literal["word", "bpe"] = "word"
    vocabulary: Count = 8192
    corpus: str
    tokens: Count
    """Tokens of pretraining."""
    sequence_length: Length = 128
    seed: Seed = 0

    @model_validator(mode="after")
    def _fills_a_sequence(self) -> "Init":
        _fills(self.tokens, self.sequence_length)
        return self


class FinetuneChange(Strict):
    """A model's or task's own fine-tuning fields, laid over the study's."""

    rank: Annotated[list[Count], one_or_more(Count), Field(min_length=1)] | None = None
    alpha: Rate | None = None
    targets: Targets | None = None
    examples: Count | None = None
    epochs: Rate | None = None
    steps: Count | None = None
    learning_rate: Rate | None = None
    batch: Count | None = None
    schedule: Schedule | None = None
    warmup: float | None = Field(None, ge=0, lt=1)
    weight_decay: float | None = Field(None, ge=0, allow_inf_nan=False)
    clip: float | None = Field(None, gt=0, allow_inf_nan=False)
    dtype: Dtype | None = None
    warm: Share | None = None
    seeds: Seeds | None = None

    @model_validator(mode="after")
    def _one_length(self) -> "FinetuneChange":
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give epochs or steps, not both")
        return self


class Finetune(Training):
    """How patches are made: LoRA on a task's own training examples."""

    rank: Annotated[list[Count], one_or_more(Count), Field(min_length=1)] = [8]
    """One rank or several."""
    alpha: Rate | None = None
    """LoRA alpha; default 2 x rank."""
    targets: Targets = "all-linear"
    examples: Count | None = None
    """At most so many training examples; the number used is recorded."""
    epochs: Rate | None = None
    steps: Count | None = None
    """Optimizer steps, instead of epochs."""
    warm: Share = 0.25
    """Share of a refit's steps that arm `warm` takes, from the old patch's values."""
    seeds: Seeds = [0]

    @model_validator(mode="after")
    def _one_length(self) -> "Finetune":
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give epochs or steps, not both")
        return self

    def changed(self, *changes: FinetuneChange | None) -> "Finetune":
        """These fields with a model's and a task's own laid over them."""
        fields = self.model_dump()
        for change in filter(None, changes):
            new = change.model_dump(exclude_none=True)
            if "epochs" in new or "steps" in new:
                fields.update(epochs=None, steps=None)
            fields.update(new)
        return Finetune(**fields)


class Model(Strict):
    """A base model θ₀: exactly one of path, hub, gguf and init."""

    path: Text | None = None
    """Directory with config.json, tokenizer and safetensors."""
    hub: HubId | None = None
    """Hugging Face id; needs a revision to run."""
    revision: str | None = None
    """Full commit sha."""
    gguf: Text | None = None
    """GGUF file, dequantised once."""
    init: Init | None = None
    shape: str | None = None
    """For hub and gguf: the model's config JSON (a file, or a name that ships with portllm), for `plan` to estimate."""
    dtype: Dtype | None = None
    """Storage dtype of the lineage for hub, gguf and init; a directory keeps its own."""
    finetune: FinetuneChange | None = None

    @model_validator(mode="after")
    def _one_source(self) -> "Model":
        _exactly_one(self, "path", "hub", "gguf", "init")
        if self.revision and not self.hub:
            raise ValueError("revision goes with hub")
        if self.path and (self.dtype or self.shape):
            raise ValueError("dtype and shape go with hub, gguf and init: a directory has its own")
        return self


class Corpus(Strict):
    """Text: exactly one of path, hub and generator; documents from a column or a template over columns."""

    path: Text | None = None
    """A .parquet, .jsonl or .txt file (a text file's documents are its lines)."""
    hub: HubId | None = None
    subset: str | None = None
    revision: str | None = None
    """Full commit sha."""
    split: str = "train"
    generator: Text | None = None
    documents: Count | None = None
    """How many documents the generator makes."""
    options: dict[str, Any] = {}
    """Of the generator."""
    text: str | None = None
    """Column that holds the document."""
    template: str | None = None
    """For example "{instruction}\\n{output}"."""
    seed: Seed = 0
    """Of the generator, and of the order of documents."""

    @model_validator(mode="after")
    def _one_source(self) -> "Corpus":
        _exactly_one(self, "path", "hub", "generator")
        if self.text and self.template:
            raise ValueError("give text or template, not both")
        if self.generator and not self.documents:
            raise ValueError("a generator needs documents")
        if (self.model_fields_set & {"split", "subset", "revision"}) and not self.hub:
            raise ValueError("split, subset and revision go with hub")
        if (self.documents or self.options) and not self.generator:
            raise ValueError("documents and options go with generator")
        if (self.hub or (self.path and not self.path.endswith(".txt"))) and not (self.text or self.template):
            raise ValueError('name the column: text: COLUMN, or template: "{column} …"')
        return self


class Update(Optimizer):
    """One entry of a lineage: continued pretraining on a corpus, or a version that exists already."""

    path: Text | None = None
    """A given version: model directory with the same tensor names and shapes."""
    hub: HubId | None = None
    revision: str | None = None
    corpus: str | None = None
    method: Literal["lora", "full"] | None = None
    rank: Count = 64
    alpha: Rate | None = None
    """LoRA alpha; default 2 x rank."""
    targets: Targets = "all-linear"
    tokens: Count | None = None
    """Tokens of each step."""
    steps: Count = 1
    """Chained updates on consecutive slices."""
    sequence_length: Length = 256
    replay: dict[str, Share] = {}
    """Older corpora and their shares of `tokens`; the corpus has the rest."""
    learning_rate: Rate | None = None
    """Peak; default 2e-4 for lora, 2e-5 for full."""

    @property
    def given(self) -> bool:
        """Whether the version exists already."""
        return bool(self.path or self.hub)

    @model_validator(mode="after")
    def _one_kind(self) -> "Update":
        _exactly_one(self, "path", "hub", "corpus")
        if self.given:
            extra = sorted(self.model_fields_set - {"path", "hub", "revision"})
            if extra:
                raise ValueError(f"a given version takes no {', '.join(extra)}")
        elif missing := [f for f in ("method", "tokens") if getattr(self, f) is None]:
            raise ValueError(f"an update needs {' and '.join(missing)}")
        elif self.tokens is not None:
            _fills(self.tokens, self.sequence_length)
            self._check_replay(self.tokens)
        return self

    def _check_replay(self, tokens: int) -> None:
        if self.corpus in self.replay:
            raise ValueError(f"replay names {self.corpus}, which is the corpus itself")
        if sum(self.replay.values()) >= 1:
            raise ValueError("the shares of replay leave nothing of the corpus: their sum must be below 1")
        for name, share in self.replay.items():
            if share * tokens < self.sequence_length:
                raise ValueError(f"replay: {share} of {tokens:,} tokens of {name} do not fill one sequence")
        _fills(tokens - sum(round(share * tokens) for share in self.replay.values()), self.sequence_length)


class Lineage(Strict):
    """A model and its ordered updates."""

    model: str
    updates: list[Update] = []
    seeds: Seeds = [0]
    """Seeds of the updates: one lineage for each."""


class Task(Strict):
    """An lm-eval task."""

    task: str
    num_fewshot: Annotated[int, Field(ge=0, strict=True)] | None = None
    """Default: the task's own."""
    limit: Count | None = None
    """First documents only."""
    include_path: str | None = None
    """Directory with a task YAML of your own."""
    finetune: FinetuneChange | None = None


class Patch(Strict):
    """An adapter that exists already."""

    path: str
    model: str | None = None
    """Model it was trained on; default: every model of the study."""


NamedTask = Annotated[
    Task, BeforeValidator(lambda v: {"task": v} if isinstance(v, str) else v, json_schema_input_type=str | Task)
]
NamedPatch = Annotated[
    Patch, BeforeValidator(lambda v: {"path": v} if isinstance(v, str) else v, json_schema_input_type=str | Patch)
]


class EvaluateSettings(Strict):
    """How cells are scored."""

    apply: Annotated[list[ApplyMode], one_or_more(ApplyMode), Field(min_length=1)] = ["merged"]
    dtype: Dtype = "float32"
    score_tokens: Count = 2048
    """Token budget of a scoring batch; one that generates fills eight with prompts and texts. Part of the recipe:
    composition moves last bits."""


class StageResources(Strict):
    """Resources of one stage; never part of a key."""

    workers: Count = 1
    threads: Count = 1
    gpus: Annotated[int, Field(ge=0, strict=True)] = 0
    zero: Literal[0, 1, 2, 3] | None = None
    micro_tokens: Count | None = None
    """Tokens of a forward pass, padding included; at least one sequence. Default: 2,048 on a CPU, 16,384 on a GPU."""
    gradient_checkpointing: bool = False
    offload: bool = False
    checkpoint_s: Rate = 120
    """Seconds between two checkpoints of a training, at least."""
    deepspeed: Text | None = None
    """A DeepSpeed configuration (JSON) of your own: its resource fields only."""
    peak_flops: Rate | None = None
    """FLOP/s of a worker's device, as its maker gives it; default: its matrix products are measured."""

    @model_validator(mode="after")
    def _offload_needs_zero(self) -> "StageResources":
        if self.offload and self.zero == 0:
            raise ValueError("offload needs a ZeRO stage of at least 1: set zero: 1, or leave zero out")
        return self


class CorpusResources(Strict):
    """Resources of reading a corpus; never part of a key."""

    threads: Count = 1
    """Tokenise with so many."""


class Resources(Strict):
    """Resources by stage."""

    corpus: CorpusResources = CorpusResources()
    base: StageResources = StageResources()
    update: StageResources = StageResources()
    finetune: StageResources = StageResources()
    evaluate: StageResources = StageResources()

    @model_validator(mode="after")
    def _evaluators_are_single(self) -> "Resources":
        if self.evaluate.deepspeed:
            raise ValueError("evaluate: deepspeed is for trainings")
        if self.evaluate.workers != 1 or self.base.workers != 1:
            raise ValueError("workers is for update and finetune; evaluators are as many as the cluster holds")
        return self


class Tracking(Strict):
    """MLflow."""

    enabled: bool = True
    uri: str | None = None
    """Default: MLFLOW_TRACKING_URI, else SQLite in the store."""
    experiment: str | None = None
    """Default: the study's name."""


class ExportChoice(Strict):
    """Merged models wanted on disk: every planned coordinate that matches."""

    lineage: str | None = None
    t: Annotated[int, Field(ge=0)] | None = None
    task: str | None = None
    arm: Arm | None = None
    rank: Count | None = None
    seed: Seed | None = None


class ReportSettings(Strict):
    """How the report decides."""

    margin: Annotated[float, Field(gt=0, lt=1)] = 0.02
    """Accuracy a port may lose against a refit and count as equal; for metrics that are no shares, of the score."""


class Study(Strict):
    """A study file."""

    name: Name
    store: str | None = None
    """Directory of results; default ./portllm-store, `--store` and PORTLLM_STORE come first."""
    data_root: str | None = None
    """DIR/<task>/{train,validation}.parquet replaces the hub's data."""
    models: dict[Name, Model] = Field(min_length=1)
    corpora: dict[Name, Corpus] = {}
    lineages: dict[Name, Lineage] = Field(min_length=1)
    tasks: Annotated[list[NamedTask], Field(min_length=1)]
    patches: dict[str, Annotated[list[NamedPatch], one_or_more(NamedPatch), Field(min_length=1)]] = {}
    """Adapters that exist already, by task; arm `port` uses them instead of training."""
    finetune: Finetune | None = None
    arms: list[Arm] = Field(["none", "port", "refit"], min_length=1)
    evaluate: EvaluateSettings = EvaluateSettings()
    resources: Resources = Resources()
    tracking: Tracking = Tracking()
    export: list[ExportChoice] = []
    diagnose: bool = False
    """Training-free numbers of every ported patch on every version (`portllm results --diagnose`)."""
    report: ReportSettings = ReportSettings()


def _fills(tokens: int, sequence_length: int) -> None:
    if tokens < sequence_length:
        raise ValueError(f"{tokens:,} tokens do not fill one sequence of {sequence_length} (sequence_length)")


def _exactly_one(value: BaseModel, *names: str) -> None:
    given = [n for n in names if getattr(value, n) is not None]
    if len(given) != 1:
        found = f"; found {' and '.join(given)}" if given else ""
        raise ValueError(f"give exactly one of {', '.join(names)}{found}")


def load(text: str, name: str, overrides: Sequence[str] = ()) -> tuple[Study, Document]:
    """Validate a study file; raises SpecError that names file, line and field."""
    document = override(parse(text, name), overrides)
    try:
        study = Study.model_validate(document.data)
    except ValidationError as error:
        raise SpecError("\n".join(complaint(e, document, Study) for e in error.errors()[:8])) from None
    _check_names(study, document)
    return study, document


def _check_names(study: Study, document: Document) -> None:
    """Names that point at other parts of the study."""
    for name, model in study.models.items():
        if model.init:
            _known(model.init.corpus, study.corpora, ("models", name, "init", "corpus"), document)
    for name, lineage in study.lineages.items():
        _known(lineage.model, study.models, ("lineages", name, "model"), document)
        for i, update in enumerate(lineage.updates):
            if update.corpus is not None:
                _known(update.corpus, study.corpora, ("lineages", name, "updates", i, "corpus"), document)
            for replayed in update.replay:
                _known(replayed, study.corpora, ("lineages", name, "updates", i, "replay"), document)
    _check_tasks(study, document)


def _check_tasks(study: Study, document: Document) -> None:
    names = [t.task for t in study.tasks]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise SpecError(f"{document.where(('tasks', i))}: task `{name}` stands twice")
    for task, patches in study.patches.items():  # whether there is such a task is known once groups are (`conversion`)
        for i, patch in enumerate(patches):
            if patch.model is not None:
                _known(patch.model, study.models, ("patches", task, i, "model"), document)
    if len(set(study.arms)) != len(study.arms):
        raise SpecError(f"{document.where(('arms',))}: an arm stands twice")
    if study.diagnose and "port" not in study.arms:
        raise SpecError(f"{document.where(('diagnose',))}: is of ported patches: add arm port, or leave it out")


def _known(word: str, known: Any, location: Location, document: Document) -> None:
    if word not in known:
        raise SpecError(f"{document.where(location)}: `{word}` is not defined{did_you_mean(word, list(known))}")
