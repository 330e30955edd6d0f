"""What a plan will cost, from shapes alone. Pure; every assumption is a constant below and is printed with the figures.

FLOPs follow the usual count: 2 per parameter and token forward, 4 more backward (2 when the weights are frozen).
"""

from collections import defaultdict
from collections.abc import Mapping

from portllm.study.facts import Facts, Shape
from portllm.study.recipes import Base, Evaluate, Finetune, Update
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
ACTIVATIONS = 1.5
"""Kept activations over the inputs and outputs of the linear modules: norms, gates and attention come on top."""
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
    flops = _flops(step, shape, facts, steps)
    speed = step.layout.gpus * GPU_FLOPS or step.layout.threads * CPU_FLOPS
    return Cost(STEP_SECONDS + flops / speed, memory(step, shape), _disk(step, shape))


def _flops(step: Step, shape: Shape, facts: Facts, steps: Mapping[str, Step]) -> float:
    recipe = step.recipe
    if isinstance(recipe, Base):
        return 6.0 * shape.parameters * recipe.tokens
    if isinstance(recipe, Update):
        return (6.0 if recipe.method == "full" else 4.0) * shape.parameters * recipe.tokens
    task = facts.tasks.get(str(step.coordinates.get("task")))
    if isinstance(recipe, Finetune) and task:
        examples = task.training if task.training is not None else EXAMPLES
        limit = getattr(steps[step.inputs["examples"]].recipe, "examples", None)
        examples = min(examples, limit or examples)
        seen = recipe.steps * recipe.optimization.batch if recipe.steps else examples * (recipe.epochs or 1.0)
        return 4.0 * _body(shape) * seen * recipe.share * DOCUMENT_TOKENS
    if isinstance(recipe, Evaluate) and task:
        limit = getattr(steps[step.inputs["requests"]].recipe, "limit", None)
        documents = task.documents if task.documents is not None else DOCUMENTS
        return 2.0 * _body(shape) * min(documents, limit or documents) * DOCUMENT_TOKENS
    return 0.0


def _body(shape: Shape) -> float:
    """Parameters that every token passes; patches and scores read the head at a few positions only."""
    return shape.parameters - shape.vocabulary * shape.hidden


def memory(step: Step, shape: Shape) -> int:
    """Bytes of a worker: its process, weights, what trains with masters, gradients and moments, and activations."""
    if step.stage not in ("base", "update", "finetune", "evaluate"):
        return 0
    return PROCESS + _state(step, shape) + _activations(step, shape)


def _activations(step: Step, shape: Shape) -> int:
    """Of a forward pass kept for the backward one: inputs and outputs of every linear module, a token each; logits."""
    if getattr(step.recipe, "optimization", None) is None:
        return 0
    a_token = sum(rows + columns for rows, columns in shape.linear)
    if step.layout.gradient_checkpointing and shape.layers:
        a_token = a_token // shape.layers + shape.layers * shape.hidden
    tokens = max(step.layout.budget, getattr(step.recipe, "sequence_length", 0))  # a pass holds one sequence at least
    logits = min(LOGITS, tokens * shape.vocabulary)
    return int((ACTIVATIONS * tokens * a_token + logits) * BYTES[_dtype(step, shape)])


def _state(step: Step, shape: Shape) -> int:
    """Weights, and of what trains the fp32 masters, gradients and Adam's two moments."""
    recipe, weights = step.recipe, shape.parameters * BYTES[_dtype(step, shape)]
    if isinstance(recipe, Update | Finetune) and recipe.lora:
        return weights + 16 * shape.lora_parameters(recipe.lora.rank)
    if isinstance(recipe, Update) or (isinstance(recipe, Base) and recipe.optimization):
        zero = step.layout.zero if step.layout.zero is not None else (1 if step.layout.workers > 1 else 0)
        optimizer = 12 * shape.parameters // (step.layout.workers if zero >= 1 else 1)
        gradients = 4 * shape.parameters // (step.layout.workers if zero >= 2 else 1)
        return (weights // step.layout.workers if zero >= 3 else weights) + gradients + optimizer
    return weights


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
