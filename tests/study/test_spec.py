"""The study file's fields: what is refused, and how it says so."""

import json
from typing import Any

import jsonschema
import pytest

from portllm.errors import SpecError
from portllm.study.document import parse
from portllm.study.schema import json_schema
from tests.conftest import ROOT
from tests.study.worlds import TEXT, study


@pytest.mark.parametrize(
    "override, message",
    [
        ("models.m.pth=x", r"models\.m\.pth: unknown key; did you mean `path`"),
        (
            "lineages.soft.updates[0].rnk=2",
            r"s\.yaml:6: lineages\.soft\.updates\[0\]\.rnk: unknown key; did you mean `rank`",
        ),
        ("finetune.targets=[]", r"finetune\.targets: give all-linear, or a list of module names"),
        ("finetune.targets=q_proj", r"finetune\.targets: a text is a pattern .*; write \[q_proj\]"),
        ("finetune.targets='(q'", r"finetune\.targets: not a regular expression"),
        ("lineages.soft.updates[0].sequence_length=1", r"sequence_length: .*greater than or equal to 2"),
        ("lineages.soft.updates[0].tokens=10", r"10 tokens do not fill one sequence of 256"),
        ("resources.finetune={offload: true, zero: 0}", r"resources\.finetune: offload needs a ZeRO stage"),
        ("finetune.rank=0", r"finetune\.rank\[0\]: .*greater than or equal to 1"),
        ("finetune.seeds=[]", r"finetune\.seeds"),
        ("finetune.seeds=[1, 1]", r"finetune\.seeds: a seed stands twice"),
        ("models.m.dtype=bfloat16", "dtype and shape go with hub, gguf and init"),
        ("finetune.²=1", "²"),
        ("models.m={hub: 'not an id!'}", r"models\.m\.hub"),
        ("finetune.learning_rate=-1", r"finetune\.learning_rate: .*greater than 0"),
        ("finetune.learning_rate=.inf", r"finetune\.learning_rate"),
        ("finetune={learning_rate: 1e-3, steps: 3, epochs: 1}", "epochs or steps, not both"),
        ("lineages.soft.model=n", r"lineages\.soft\.model: `n` is not defined"),
        ("lineages.soft.updates[0].corpus=cc", r"updates\[0\]\.corpus: `cc` is not defined; did you mean `c`"),
        ("models.m.hub=a/b", "exactly one of path, hub, gguf, init; found path and hub"),
        ("lineages.soft.updates[0].method=null", "an update needs method"),
        ("tasks=[easy, easy]", "task `easy` stands twice"),
        ("arms=[none, prot]", r"arms\[1\]"),
        ("arms=[none, none]", "an arm stands twice"),
        ("evaluate.apply=glued", r"evaluate\.apply"),
        ("resources.evaluate.workers=2", "evaluators are as many as the cluster holds"),
        ("corpora.c={path: c.jsonl}", "name the column"),
        ("corpora.c={generator: toy}", "a generator needs documents"),
        ("name='../x'", "name"),
    ],
)
def test_what_is_wrong_is_refused_by_field(override, message):
    with pytest.raises(SpecError, match=message):
        study(TEXT, override)


def test_a_task_or_model_may_change_the_fine_tuning():
    asked = study(
        TEXT, "models.m.finetune={steps: 7}", "tasks=[{task: easy, finetune: {rank: 2, learning_rate: 5e-4}}]"
    )
    fields = asked.finetune.changed(asked.models["m"].finetune, asked.tasks[0].finetune)
    assert (fields.steps, fields.epochs, fields.rank, fields.learning_rate, fields.seeds) == (
        7,
        None,
        [2],
        5e-4,
        [1, 2],
    )


def test_the_schema_accepts_what_the_loader_accepts():
    schema = json.loads(json.dumps(json_schema()))
    assert schema["additionalProperties"] is False
    jsonschema.Draft202012Validator.check_schema(schema)
    for file in sorted((ROOT / "jobs").glob("*.yaml")):
        jsonschema.validate(parse(file.read_text(), file.name).data, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(parse(TEXT, "s.yaml").data | {"naem": "x"}, schema)


def _yaml_12(text: str) -> Any:
    """As an editor reads it: `500_000` is text, and so is `5e-4` to some."""
    import re

    import yaml

    class Plain(yaml.SafeLoader):
        pass

    Plain.yaml_implicit_resolvers = {
        key: [
            (tag, regex) for tag, regex in resolvers if tag not in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
        ]
        for key, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    Plain.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
    return yaml.load(text, Loader=Plain)


@pytest.mark.parametrize("job", sorted(path.name for path in (ROOT / "jobs").glob("*.yaml")))
def test_the_jobs_are_valid_for_an_editor(job: str) -> None:
    jsonschema.Draft202012Validator(json_schema()).validate(_yaml_12((ROOT / "jobs" / job).read_text()))
