"""What a plan will cost, from shapes alone. Pure; every assumption is a constant below and is printed with the figures.

FLOPs follow the usual count: 2 per weight and token forward, 4 more backward (2 where the weight is frozen). Times are
those of the devices a step is charged for, as its record has them (`Layout.devices`).
"""

from collections import defaultdict
from collections.abc import Mapping

from portllm.study.facts import Facts, Shape
from portllm.study.recipes import Base, Evaluate, Finetune, Update
from portllm.study.resources import zero_stage
from portllm.study.steps import Cost, Plan, Step

CPU_FLOPS = 4e10
"""A second, for one thread."""
GPU_FLOPS = 1.5e14
"""A second, for one GPU: 40 % of a current card's bf16 peak."""
DOCUMENT_TOKENS = 100
"""Tokens of one example or one request, before anything is tokenised."""
EXAMPLES = 5000
"""Training examples of a task whose data are not at hand."""
DOCUMENTS = 2000
"""Evaluated documents of a task whose data are not at hand."""
PROCESS = 700_000_000
"""Bytes of a worker process that has imported torch, transformers and DeepSpeed."""
LOGITS = 2**26
"""Logits that a training makes at once (`work/head.py`)."""
KEPT = 1.0
"""Kept activations over the inputs and outputs of the linear modules, in the training's dtype: home-12M 0.88 to 1.11,
Gemma 3 270M 0.95 (what autograd saved of a forward pass). Norms keep their inputs in fp32 beside them."""
HEAP = 1.5
"""What a CPU's heap grows to over the activations kept: blocks that were freed between them (measured 1.3 to 1.9). On a
GPU the ledger reads what is allocated."""
STEP_SECONDS = 0.5
"""Fixed cost of any step in a warm worker."""
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def by_stage(plan: Plan, skip: frozenset[str] = frozenset()) -> dict[str, Cost]:
    """Cost of the steps that are not in `skip`, by stage."""
    result: dict[str, Cost] = defaultdict(Cost)
    for step in plan.steps.values():
        if step.key not in skip:
            result[step.stage] += step.cost
    return dict(result)


def cost(step: Step, facts: Facts, steps: Mapping[str, Step]) -> Cost:
    """Cost of one step; only the fixed part where the model's shape is unknown."""
    model = facts.models.get(str(step.coordinates.get("model")))
    shape = model.shape if model else None
    if shape is None or model is None:
        return Cost(STEP_SECONDS)
    layout = step.layout
    worker = GPU_FLOPS if layout.gpus else layout.threads * CPU_FLOPS  # a rank computes on one GPU, however many it has
    wall = STEP_SECONDS + _flops(step, shape, facts, steps) / (layout.workers * worker)
    return Cost(wall * layout.devices, memory(step, shape), _disk(step, shape))


def _flops(step: Step, shape: Shape, facts: Facts, steps: Mapping[str, Step]) -> float:
    """As the ledger counts them (`work/ledger.py`), the head left out where few positions read it: patches, scores."""
    recipe = step.recipe
    if isinstance(recipe, Base):
        return 6.0 * (shape.body + shape.head) * recipe.tokens
    if isinstance(recipe, Update):
        tokens = recipe.tokens + sum(part.tokens for part in recipe.replay)
        moved = 6.0 * shape.lora_parameters(recipe.lora.rank) if recipe.lora else 2.0 * (shape.body + shape.head)
        return (4.0 * (shape.body + shape.head) + moved) * tokens
    task = facts.tasks.get(str(step.coordinates.get("task")))
    if isinstance(recipe, Finetune) and task:
        examples = task.training if task.training is not None else EXAMPLES
        limit = getattr(steps[step.inputs["examples"]].recipe, "examples", None)
        examples = min(examples, limit or examples)
        seen = recipe.steps * recipe.optimization.batch if recipe.steps else examples * (recipe.epochs or 1.0)
        a_token = 4.0 * shape.body + 6.0 * shape.lora_parameters(recipe.lora.rank)
        return a_token * seen * recipe.share * DOCUMENT_TOKENS
    if isinstance(recipe, Evaluate) and task:
        limit = getattr(steps[step.inputs["requests"]].recipe, "limit", None)
        documents = task.documents if task.documents is not None else DOCUMENTS
        return 2.0 * shape.body * min(documents, limit or documents) * DOCUMENT_TOKENS
    return 0.0


def memory(step: Step, shape: Shape) -> int:
    """Bytes of a worker: its process, weights, what trains with masters, gradients and moments, and activations."""
    if step.stage not in ("base", "update", "finetune", "evaluate"):
        return 0
    return PROCESS + _state(step, shape) + _activations(step, shape)


def _activations(step: Step, shape: Shape) -> int:
    """Of a forward pass kept for the backward one: inputs and outputs of linear modules, norms' inputs; and logits."""
    if getattr(step.recipe, "optimization", None) is None:
        return 0
    size = BYTES[_dtype(step, shape)]
    a_token = KEPT * size * sum(rows + columns for rows, columns in shape.linear)
    a_token += 4 * shape.norms if size < 4 else 0  # in fp32 they are among the inputs
    if step.layout.gradient_checkpointing and shape.layers:
        a_token = a_token / shape.layers + size * shape.layers * shape.hidden
    tokens, heap = _pass_tokens(step), 1.0 if step.layout.gpus else HEAP
    return int(heap * tokens * a_token) + size * min(LOGITS, tokens * shape.vocabulary)


def _pass_tokens(step: Step) -> int:
    """Tokens of a forward pass: the layout's, one sequence at least, the rank's share of a global batch at most."""
    length = getattr(step.recipe, "sequence_length", DOCUMENT_TOKENS)
    share = -(-step.recipe.optimization.batch // step.layout.workers)
    return int(min(max(step.layout.budget, length), share * length))


def _state(step: Step, shape: Shape) -> int:
    """Weights, and of what trains the fp32 masters, gradients and Adam's two moments."""
    recipe, weights = step.recipe, shape.parameters * BYTES[_dtype(step, shape)]
    if isinstance(recipe, Update | Finetune) and recipe.lora:
        return weights * _copies(step, shape) + 16 * shape.lora_parameters(recipe.lora.rank)
    if isinstance(recipe, Update) or (isinstance(recipe, Base) and recipe.optimization):
        resident = weights if isinstance(recipe, Update) else 0  # what `init` makes has no version beside it
        return resident + _in_training(step, shape, weights)
    if isinstance(recipe, Evaluate) and recipe.scales and recipe.apply == "merged" and step.layout.gpus:
        return weights + shape.body * BYTES[_dtype(step, shape)]  # the patched ones, beside the version's own
    return weights


def _copies(step: Step, shape: Shape) -> int:
    """Of a version under a LoRA: the resident weights, and private ones where those begin off a 64-byte boundary.

    A mapped file's nearly always do; memory that torch allocated (another dtype, a GPU) never does.
    """
    return 1 if step.layout.gpus or _dtype(step, shape) != shape.storage else 2


def _in_training(step: Step, shape: Shape, weights: int) -> int:
    """The private weights of a full training with all that moves them, and the sum of the head's gradient."""
    workers, half = step.layout.workers, _dtype(step, shape) != "float32"
    zero = zero_stage(step.layout, workers, "full", _dtype(step, shape))
    masters = 4 if half or zero else 0  # alone and in fp32 the weights are their own masters
    optimizer = (8 + masters) * shape.parameters // (workers if zero >= 1 else 1)
    gradients = 4 * shape.parameters // (workers if zero >= 2 else 1)
    head = (4 + (BYTES[_dtype(step, shape)] if half else 0)) * shape.head  # in fp32, then in the weight's dtype
    return (weights // workers if zero >= 3 else weights) + optimizer + gradients + head


def _disk(step: Step, shape: Shape) -> int:
    recipe = step.recipe
    if isinstance(recipe, Update | Finetune) and recipe.lora:
        return 4 * shape.lora_parameters(recipe.lora.rank)
    return shape.parameters * BYTES[shape.storage] if step.stage in ("base", "update", "export") else 0


def _dtype(step: Step, shape: Shape) -> str:
    optimization = getattr(step.recipe, "optimization", None)
    return str(optimization.dtype if optimization else getattr(step.recipe, "dtype", None) or shape.storage)


def total(costs: Mapping[str, Cost]) -> Cost:
    """Sum over stages (memory: the largest)."""
    return sum(costs.values(), Cost())
