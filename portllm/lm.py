"""This scorer as one of lm-eval's models: `lm_eval.simple_evaluate(model=ScorerLM(model, tokenizer), tasks=[…])`.

    from portllm.lm import ScorerLM

Prompts, targets, filters and metrics are lm-eval's; how the requests are scored is `work/scoring.py` and
`work/generating.py`.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from portllm.errors import StageError
from portllm.work.generating import generate
from portllm.work.requests import RequestSet
from portllm.work.scoring import Scores, loglikelihoods
from portllm.work.tokenizing import Encoder, window

Rows = Sequence[tuple[Sequence[int], int]]
"""(token ids, index of the first one scored)."""


class ScorerLM(LM):
    """A loaded causal model, or a PEFT model around one, and its tokenizer."""

    def __init__(self, model: Any, tokenizer: Any, score_tokens: int = 2048, add_bos: bool | None = None) -> None:
        """`score_tokens`: token budget of a scoring batch; one that generates fills sixteen.

        `add_bos`: None leaves it to the tokenizer, as HFLM does.
        """
        super().__init__()
        self.model = _causal(model).eval()
        self.tokenizer = tokenizer
        self.score_tokens = score_tokens
        self.encoder = Encoder(tokenizer, add_bos)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood, whether it is the greedy continuation) of each (context, continuation)."""
        alike: dict[tuple[str | None, int | None], int] = {}
        documents = [alike.setdefault((request.task_name, request.doc_id), len(alike)) for request in requests]
        rows = self.encoder.pairs([request.args[:2] for request in requests])
        for request, (ids, first) in zip(requests, rows, strict=True):
            if not 0 < first < len(ids):
                raise StageError(f"the continuation {request.args[1]!r} has no token of its own after its context")
        scores = self._score(rows, documents, "loglikelihood")
        return list(zip(scores.loglikelihoods.tolist(), scores.greedy.tolist(), strict=True))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each text, window by window."""
        rows = self.encoder.texts([request.args[0] for request in requests])
        found: list[float] = self._score(rows, range(len(rows)), "loglikelihood_rolling").loglikelihoods.tolist()
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The greedy continuation of each prompt, cut before its first stop sequence."""
        alike: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            alike[json.dumps(request.args[1], sort_keys=True, default=str)].append(number)
        texts = [""] * len(requests)
        for numbers in alike.values():
            ids = self.encoder.contexts([requests[number].args[0] for number in numbers])
            rows = [(row, len(row)) for row in ids]
            asked = self._requests(rows, range(len(rows)), "generate_until", requests[numbers[0]].args[1])
            found = generate(self.model, self.tokenizer, asked, self.score_tokens).texts
            for number, text in zip(numbers, found, strict=True):
                texts[number] = text
        return texts

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The tokenizer's own template: part of lm-eval's cache keys."""
        return str(self.tokenizer.chat_template or "") if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as text; without its system messages where the template takes none, as HFLM does."""
        from jinja2 import TemplateError

        render = partial(
            self.tokenizer.apply_chat_template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        try:
            return str(render(chat_history))
        except TemplateError:
            return str(render([message for message in chat_history if message["role"] != "system"]))

    def _score(self, rows: Rows, documents: Sequence[int], kind: str) -> Scores:
        return loglikelihoods(self.model, self._requests(rows, documents, kind), self.score_tokens)

    def _requests(
        self, rows: Rows, documents: Sequence[int], kind: str, generation: dict[str, Any] | None = None
    ) -> RequestSet:
        """One request a row; those of one document may share the beginning of their contexts."""
        count = np.arange(len(rows))
        return RequestSet(
            tokens=np.asarray([token for ids, _ in rows for token in ids], dtype=np.uint32),
            offsets=np.cumsum([0, *(len(ids) for ids, _ in rows)]),
            answers=np.asarray([first for _, first in rows], dtype=np.int64),
            documents=np.asarray(documents, dtype=np.int64),
            choices=np.zeros_like(count),
            doc_ids=count,
            doc_hashes=np.full(len(rows), b""),
            meta={
                "output_type": kind,
                "task": kind,
                "generation": generation,
                "model_max_length": window(None, self.tokenizer),
            },
        )


def _causal(model: Any) -> Any:
    """The causal model that a PEFT model wraps, its adapters inside. StageError for those that change the prompt."""
    if not hasattr(model, "get_base_model"):
        return model
    if model.active_peft_config.is_prompt_learning:
        raise StageError("an adapter that puts tokens before the prompt cannot be scored: give the model without it")
    return model.get_base_model()
