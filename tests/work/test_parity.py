"""100 documents of every real task beside lm-eval's HFLM in fp32; `make parity` compares whole validation sets."""

from pathlib import Path

import pytest

from tests.benchmarks import parity

pytestmark = [pytest.mark.real, pytest.mark.usefixtures("one_thread")]

MODELS = ("stories260K", "home-12M", *parity.random_configs(8))


@pytest.fixture(scope="module")
def models(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return dict(parity.models(tmp_path_factory.mktemp("models")))


@pytest.mark.parametrize("task", parity.CHOICES)
@pytest.mark.parametrize("model", MODELS)
def test_scores_choices_and_metrics_are_those_of_hflm(model: str, task: str, models: dict[str, Path]) -> None:
    found = parity.compare(models[model], task, 100, None)
    assert found.documents == (71 if task == "wnli" else 100)
    assert found.metrics and found.other == 0 and found.largest <= parity.WITHIN


QUICK = {("stories260K", 0), ("stories260K", 5), ("random Mistral", 0), ("random Llama", 0), ("random GPT-2", 0)}
"""Each 5 to 16 s of one core, most of it HFLM's; the other pairs take up to 50 s (`make test-long`)."""


@pytest.mark.parametrize(
    ("model", "shots"),
    [
        pytest.param(model, shots, marks=() if (model, shots) in QUICK else pytest.mark.long)
        for model in MODELS
        for shots in (0, 5)
    ],
)
def test_generated_texts_are_those_of_hflm(model: str, shots: int, models: dict[str, Path]) -> None:
    found = parity.compare(models[model], "gsm8k", 100, shots)
    assert (found.documents, found.other, found.metrics) == (2 * 100, 0, True)  # one row a filter
