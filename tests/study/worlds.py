"""A study and its facts as plain values: planning needs no files."""

from portllm.study.facts import CorpusFacts, Facts, Given, ModelFacts, PatchFacts, Shape, TaskFacts
from portllm.study.plan import make_plan
from portllm.study.spec import Study, load
from portllm.study.steps import Plan

TEXT = """
name: world
models: {m: {path: model}}
corpora: {c: {path: c.parquet, text: text}}
lineages:
  soft: {model: m, updates: [{corpus: c, method: lora, rank: 4, tokens: 1000, steps: 2}]}
  hard: {model: m, updates: [{corpus: c, method: full, tokens: 1000, steps: 2}]}
tasks: [easy, hard]
finetune: {rank: 8, learning_rate: 1e-3, examples: 10, seeds: [1, 2]}
"""


def given(what: str, name: str) -> Given:
    return Given(f"{what}-{name}".ljust(64, "0"), f"/given/{name}", what)


def facts(names: tuple[str, ...] = ("easy", "hard"), **changes: object) -> Facts:
    sizes = {"parameters": 1000, "linear": ((8, 8),) * 4, "layers": 2, "hidden": 16, "vocabulary": 32}
    shape = Shape(**sizes, modules=("k_proj", "q_proj", "w_proj"), max_positions=512)
    values = {
        "lm_eval": "0.4.13",
        "models": {"m": ModelFacts(given("model", "m"), given("tokenizer", "m"), shape=shape)},
        "corpora": {"c": CorpusFacts(given("corpus", "c"), format="parquet", rows=10)},
        "tasks": {
            t: TaskFacts(None, given("data", t), config=t, documents=50, training=100, choices=2, template=t)
            for t in names
        },
        "patches": {("easy", 0): PatchFacts(given("patch", "p"), rank=8)},
    }
    return Facts(**(values | changes))  # type: ignore[arg-type]


def study(text: str = TEXT, *overrides: str) -> Study:
    return load(text, "s.yaml", overrides)[0]


def plan(*overrides: str, **changes: object) -> Plan:
    asked = study(TEXT, *overrides)
    return make_plan(asked, facts(tuple(t.task for t in asked.tasks), **changes))
