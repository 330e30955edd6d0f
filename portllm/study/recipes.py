"""Recipes: everything that can change a number, one frozen value per stage. All of it is hashed, nothing else is.

Input roles, the same for every stage that needs them (a role maps to a key in the plan and to a path at run time):

    root                 complete model directory: θ₀, or the last version with its own full weights
    zero                 θ₀ of the lineage (diagnose)
    other                patch trained on the version itself (diagnose)
    delta1, delta2, …    LoRA updates on top of root, in order (PEFT adapter directories)
    patch1, patch2, …    patches Δθ to apply, in order, or one to start from (PEFT adapter directories)
    tokenizer            directory with the tokenizer's files
    source               corpus file, or GGUF file
    corpus               output of `corpus`
    replay1, replay2, …  outputs of `corpus` for older corpora (update)
    requests             output of `requests`, evaluation documents
    examples             output of `requests`, training examples
    screen1, screen2, …  outputs of `requests` whose documents must not reach training
    definition           directory with the lm-eval task's YAML (absent for a task built into lm-eval)
    data                 directory with train.parquet and validation.parquet (absent for a hub's data set)
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Dtype = Literal["float32", "bfloat16", "float16"]
Schedule = Literal["cosine", "linear", "constant"]
Format = Literal["parquet", "jsonl", "text"]


@dataclass(frozen=True)
class Optimization:
    """How a training moves: AdamW over global batches in an order fixed by the seed."""

    learning_rate: float
    """Peak, after warm-up."""
    batch: int
    """Global batch: packed sequences for an update, examples for fine-tuning."""
    seed: int
    schedule: Schedule = "cosine"
    warmup: float = 0.03
    """Share of all optimizer steps."""
    weight_decay: float = 0.0
    clip: float = 1.0
    """Largest gradient norm."""
    betas: tuple[float, float] = (0.9, 0.999)
    dtype: Dtype = "float32"
    """Of compute and frozen weights; what trains has fp32 masters."""


@dataclass(frozen=True)
class Lora:
    """Shape of a LoRA delta ΔW = (alpha/rank)·B·A."""

    rank: int
    alpha: float
    targets: str | tuple[str, ...] = "all-linear"
    """PEFT's `target_modules`."""


@dataclass(frozen=True)
class Text:
    """A corpus's documents. Exactly one origin: role `source` (format says how to read it), `hub` or `generator`."""

    format: Format | None = None
    text: str | None = None
    """Column of the document's text."""
    template: str | None = None
    """`str.format` template over the columns, instead of `text`."""
    hub: str | None = None
    subset: str | None = None
    revision: str | None = None
    """Full commit sha."""
    split: str = "train"
    generator: str | None = None
    documents: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    """Of the generator, and of the order of the documents."""


@dataclass(frozen=True)
class Base:
    """θ₀ as a model directory, when it is not one already."""

    source: Literal["init", "hub", "gguf"]
    storage: Dtype = "float32"
    """Storage dtype D of the lineage."""
    hub: str | None = None
    revision: str | None = None
    model_type: str | None = None
    """transformers' name of the architecture (`mistral`, `llama`, …), for `init`."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of its config class, for `init`."""
    tokenizer: Literal["word", "bpe"] = "word"
    vocabulary: int = 8192
    """Largest vocabulary size, for `init`."""
    text: Text | None = None
    """Corpus pretrained on, for `init` (role `source` when it is a file)."""
    excluded: tuple[int, ...] = ()
    """Documents (row numbers) of the text that hold an evaluated prompt."""
    tokens: int = 0
    sequence_length: int = 128
    """Tokens."""
    optimization: Optimization | None = None


@dataclass(frozen=True)
class Corpus:
    """A corpus tokenised and concatenated: documents shuffled by the text's seed, EOS after each."""

    text: Text
    excluded: tuple[int, ...] = ()
    """Documents (row numbers) that hold an evaluated prompt; they are dropped and counted."""


@dataclass(frozen=True)
class Requests:
    """An lm-eval task's documents as token ids for one tokenizer."""

    task: str
    split: Literal["evaluate", "train"]
    lm_eval: str
    """Version of lm_eval; prompts and metrics may change with it."""
    config: str = ""
    """Digest of the task's definition."""
    num_fewshot: int | None = None
    """None is the task's own default."""
    limit: int | None = None
    """First documents only (evaluate)."""
    examples: int | None = None
    """At most so many training examples, drawn in a fixed random order (train)."""
    window: int | None = None
    """Longest example in tokens (train). None: what the tokenizer's directory says."""
    dataset: str | None = None
    """Hub data set when no role `data` is given: path, and after a colon the subset."""
    revision: str | None = None
    add_bos: bool | None = None
    """None decides as lm-eval does for the architecture."""


@dataclass(frozen=True)
class Slice:
    """Tokens [start, start + tokens) of a corpus."""

    start: int
    tokens: int


@dataclass(frozen=True)
class Update:
    """θₜ → θₜ₊₁: continued pretraining on tokens [start, start + tokens) of a corpus."""

    method: Literal["lora", "full"]
    tokens: int
    sequence_length: int
    optimization: Optimization
    start: int = 0
    """First token of the slice: chained updates take consecutive slices."""
    lora: Lora | None = None
    replay: tuple[Slice, ...] = ()
    """Slices of older corpora, in the order of the roles replay1, replay2, …, trained on among the corpus's."""


@dataclass(frozen=True)
class Finetune:
    """θₜ → Δθ: a LoRA patch trained on a task's examples, loss on the continuation only.

    With the role patch1 it starts from that patch's values and has its shape (arm `warm`).
    """

    lora: Lora
    optimization: Optimization
    epochs: float | None = None
    steps: int | None = None
    """Optimizer steps; exactly one of epochs and steps is set."""
    share: float = 1.0
    """Of these steps, so many are taken."""


@dataclass(frozen=True)
class Evaluate:
    """One cell's scores: patches added to a version in order, then one task scored."""

    lm_eval: str
    apply: Literal["merged", "adapter"] = "merged"
    dtype: Dtype = "float32"
    """Of the forward pass; a merged patch is rounded to the version's storage dtype first."""
    scales: tuple[float, ...] = ()
    """λ of each patch, in the order of the roles patch1, patch2, …"""
    combine: Literal["sum"] = "sum"
    score_tokens: int = 2048
    """Token budget of a scoring batch (sixteen of a generating one): composition moves last bits, so it is fixed, never
    probed."""


@dataclass(frozen=True)
class Export:
    """A version with patches merged, as a model directory."""

    scales: tuple[float, ...] = ()
    dtype: Dtype | None = None
    """None keeps the version's storage dtype."""


@dataclass(frozen=True)
class Diagnose:
    """Training-free numbers about one patch on one version: nothing to choose."""
