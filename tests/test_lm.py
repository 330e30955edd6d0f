"""The scorer as one of lm-eval's models: `simple_evaluate` takes it as it is, and gets HFLM's numbers."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from peft import PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from portllm.errors import StageError
from portllm.lm import ScorerLM
from tests.toys import WORDS, write_model, write_patch, write_tasks


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    root = write_tasks(tmp_path_factory.mktemp("world"), ("mood",))
    write_model(root / "model")
    return root


@pytest.fixture(scope="module")
def both(world: Path) -> tuple[ScorerLM, HFLM]:
    model = AutoModelForCausalLM.from_pretrained(world / "model")
    ours = ScorerLM(model, AutoTokenizer.from_pretrained(world / "model"), score_tokens=256)
    return ours, HFLM(pretrained=str(world / "model"), device="cpu", dtype="float32", batch_size=4)


def asked(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, given, number) for number, given in enumerate(arguments)]


def test_pairs_and_texts_score_as_hflm_scores_them(both: tuple[ScorerLM, HFLM]) -> None:
    pairs = asked("loglikelihood", ("it was good", " film"), ("it was good", " bad film"), ("", "nice"), ("a", " very"))
    ours, theirs = (lm.loglikelihood(pairs) for lm in both)
    np.testing.assert_allclose([score for score, _ in ours], [score for score, _ in theirs], atol=1e-4)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    texts = asked(
        "loglikelihood_rolling", ("it was a very good film",), (" ".join(random.Random(1).choices(WORDS, k=160)),)
    )
    np.testing.assert_allclose(*(lm.loglikelihood_rolling(texts) for lm in both), atol=1e-3)


def test_prompts_of_several_settings_are_continued_as_hflm_continues_them(both: tuple[ScorerLM, HFLM]) -> None:
    few, more = ({"until": ["film"], "max_gen_toks": n, "do_sample": False} for n in (4, 9))
    prompts = asked("generate_until", ("it was", few), ("a very nice", more), ("poor film", few), ("the", more))
    assert both[0].generate_until(prompts) == both[1].generate_until(prompts)


def test_a_text_without_a_context_needs_a_token_before_it(world: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    tokenizer.bos_token = tokenizer.eos_token = None
    lm = ScorerLM(AutoModelForCausalLM.from_pretrained(world / "model"), tokenizer)
    for score, request in (
        (lm.loglikelihood_rolling, asked("loglikelihood_rolling", ("it was good",))),
        (lm.loglikelihood, asked("loglikelihood", ("", " good"))),
    ):
        with pytest.raises(StageError, match="neither a BOS nor an EOS token"):
            score(request)
    assert lm.loglikelihood(asked("loglikelihood", ("it was", " good")))[0][0] < 0


def test_simple_evaluate_takes_it_as_it_is(world: Path, both: tuple[ScorerLM, HFLM]) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    from portllm.formats import lmeval

    task = lmeval.build(lmeval.TaskSource("mood", world / "tasks", world / "data" / "mood"))
    found = [
        lm_eval.simple_evaluate(lm, tasks=[task], bootstrap_iters=0, task_manager=TaskManager(include_defaults=False))
        for lm in both
    ]
    ours, theirs = (one["results"]["mood"] for one in found)
    assert {name: ours[name] for name in ours if name.startswith("acc")} == {
        name: theirs[name] for name in theirs if name.startswith("acc")
    }


def test_a_peft_model_is_scored_with_its_adapter(world: Path, tmp_path: Path, both: tuple[ScorerLM, HFLM]) -> None:
    patch = write_patch(tmp_path / "patch", world / "model")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world / "model"), str(patch))
    theirs = HFLM(pretrained=str(world / "model"), peft=str(patch), device="cpu", dtype="float32")
    pairs = asked("loglikelihood", ("it was good", " film"), ("a", " very nice film"))
    ours = [score for score, _ in ScorerLM(adapted, both[0].tokenizer).loglikelihood(pairs)]
    np.testing.assert_allclose(ours, [score for score, _ in theirs.loglikelihood(pairs)], atol=1e-4)
    assert abs(ours[0] - both[0].loglikelihood(pairs)[0][0]) > 1e-3


def test_an_adapter_of_prompts_is_refused(world: Path, both: tuple[ScorerLM, HFLM]) -> None:
    model = AutoModelForCausalLM.from_pretrained(world / "model")
    adapted = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(StageError, match="puts tokens before the prompt"):
        ScorerLM(adapted, both[0].tokenizer)


def test_a_continuation_without_a_token_is_refused(both: tuple[ScorerLM, HFLM]) -> None:
    with pytest.raises(StageError, match="the continuation '' has no token of its own"):
        both[0].loglikelihood(asked("loglikelihood", ("it was", " good"), ("it was", "")))


def test_a_template_without_a_system_role_gets_none(world: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    )
    lm = ScorerLM(AutoModelForCausalLM.from_pretrained(world / "model"), tokenizer)
    talk = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    assert lm.apply_chat_template(talk) == lm.apply_chat_template(talk[1:]) == "user: hello\n"
