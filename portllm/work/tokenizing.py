"""Text to token ids exactly as lm-eval's `HFLM` does it, in batches.

`TemplateLM._encode_pair`: blanks at the end of a context move to the continuation; context and whole text are encoded
apart, and the continuation is what the whole has beyond the context's length. A text that begins with the BOS token
gets no second one. Without `add_bos` the tokenizer decides about special tokens (lm-eval 0.4.13 has no rule of its own
for any architecture).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from portllm.errors import StageError


def load_tokenizer(path: Path, add_bos: bool | None = None) -> Any:
    """The tokenizer in a directory, without touching the hub. Raises StageError where there is none."""
    from transformers import AutoTokenizer

    options = {} if add_bos is None else {"add_bos_token": add_bos}
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, **options)
    except (OSError, ValueError) as error:
        raise StageError(f"no tokenizer can be read from {path}: {error}") from error


def window(path: Path | None, tokenizer: Any) -> int:
    """Longest sequence in tokens, as lm-eval finds it: config.json beside the tokenizer, else the tokenizer's own."""
    from lm_eval.models.utils import resolve_max_length

    config = None
    if path is not None and (path / "config.json").is_file():
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(path, local_files_only=True)
    return int(resolve_max_length(config, tokenizer))


class Encoder:
    """`HFLM.tok_encode` and its kin over many texts at once; every distinct text is encoded once per call."""

    def __init__(self, tokenizer: Any, add_bos: bool | None = None) -> None:
        self.tokenizer = tokenizer
        self._special = {} if add_bos is None else {"add_special_tokens": add_bos}
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.prefix = eos if bos is None else bos
        """Stands in for an empty context."""

    def encode(self, texts: Sequence[str], bos: str | None) -> dict[str, list[int]]:
        """Token ids by text; a text that begins with `bos` gets no special tokens."""
        distinct = list(dict.fromkeys(texts))
        given = [t for t in distinct if bos is not None and t.startswith(bos)]
        plain = [t for t in distinct if bos is None or not t.startswith(bos)]
        return self._batch(plain, self._special) | self._batch(given, {"add_special_tokens": False})

    def _batch(self, texts: list[str], options: dict[str, bool]) -> dict[str, list[int]]:
        if not texts:
            return {}
        return dict(zip(texts, self.tokenizer(texts, verbose=False, **options)["input_ids"], strict=True))

    def contexts(self, texts: Sequence[str]) -> list[list[int]]:
        """Prompts of generation (`HFLM.tok_batch_encode`, neither padded nor cut)."""
        ids = self.encode(texts, self.tokenizer.bos_token)
        return [ids[t] for t in texts]

    def pairs(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], int]]:
        """Per (context, continuation): ids of both, and where the continuation begins (`HFLM.loglikelihood`)."""
        moved = [self._move_blanks(context, continuation) for context, continuation in pairs]
        bos = None if self.prefix is None else self.tokenizer.decode(self.prefix)
        texts = [text for (c, k), pair in zip(moved, pairs, strict=True) if pair[0] for text in (c, c + k)]
        ids = self.encode(texts, bos)
        alone = self._batch(list({k for c, k in pairs if not c}), {"add_special_tokens": False})
        return [
            self._join(ids[c], ids[c + k]) if pair[0] else self._after_prefix(alone[pair[1]])
            for (c, k), pair in zip(moved, pairs, strict=True)
        ]

    def texts(self, texts: Sequence[str]) -> list[tuple[list[int], int]]:
        """Per text: its ids after the token that stands before it, and 1 (`HFLM.loglikelihood_rolling`)."""
        bos = None if self.prefix is None else self.tokenizer.decode(self.prefix)
        ids = self.encode(texts, bos)
        return [([self._first(), *ids[text]], 1) for text in texts]

    @staticmethod
    def _move_blanks(context: str, continuation: str) -> tuple[str, str]:
        bare = context.rstrip()
        return bare, context[len(bare) :] + continuation

    @staticmethod
    def _join(context: list[int], whole: list[int]) -> tuple[list[int], int]:
        return context + whole[len(context) :], len(context)

    def _after_prefix(self, continuation: list[int]) -> tuple[list[int], int]:
        if continuation[:1] == [self.prefix]:
            return continuation, 1
        return [self._first(), *continuation], 1

    def _first(self) -> int:
        """The token that stands before a text without a context."""
        if self.prefix is None:
            raise StageError("the tokenizer has neither a BOS nor an EOS token, and one must stand before a text that "
                             "has no context: set `bos_token` in it")  # fmt: skip
        return self.prefix
