"""Documents in one row: each is read as if it stood there alone, by every family of models and by the loss."""

import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy

from portllm.errors import StageError
from portllm.work.batches import Batch, Sequences, collate, examples, mixed, packed
from portllm.work.loss import SummedLoss
from portllm.work.packing import keeps_apart
from tests.work.checkpoints import CONFIGS

LENGTH = 24
OFFSETS = np.array([0, 9, 10, 31, 40, 48, 63, 72])
"""Of documents over three rows of 24 tokens: one of a single token, ones that a row's end cuts, one that fills 15."""
FAMILIES: dict[str, Any] = {name: make for name, make in CONFIGS.items() if name != "phi3"} | {
    "mistral": lambda: transformers.MistralConfig(
        vocab_size=96, hidden_size=40, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=10, sliding_window=6, initializer_range=0.1,
    ),
}  # fmt: skip


def model(family: str) -> Any:
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return made


def corpus(out: Path, offsets: np.ndarray = OFFSETS, seed: int = 0) -> Path:
    """What stage `corpus` writes, with random tokens; documents are the rows 100, 101, … of their source."""
    out.mkdir(exist_ok=True)
    np.save(out / "tokens.npy", np.random.default_rng(seed).integers(1, 96, offsets[-1]).astype(np.uint32))
    np.save(out / "offsets.npy", offsets)
    np.save(out / "rows.npy", 100 + np.arange(len(offsets) - 1))
    return out


def loss_of(loss: SummedLoss, data: Sequences, ids: Batch) -> torch.Tensor:
    arrays = collate(data, ids)
    given = arrays.ids_BT, arrays.positions_BT, arrays.rows_N, arrays.targets_N
    return loss(*(None if array is None else torch.from_numpy(array) for array in given), 1)


def pieces(data: Sequences) -> list[torch.Tensor]:
    """The documents of all rows, cut where a row ends."""
    cuts = sorted({*data.offsets.tolist(), *data.starts.tolist(), *data.ends.tolist()})
    tokens = np.asarray(data.tokens).astype(np.int64)
    return [torch.from_numpy(tokens[a:b]) for a, b in pairwise(cuts)]


def alone(model: Any, documents: Sequence[torch.Tensor]) -> torch.Tensor:
    """The loss of documents that each have a row of their own, by the model's own logits."""
    each = [
        cross_entropy(model(input_ids=ids[None], use_cache=False).logits[0, :-1].float(), ids[1:], reduction="sum")
        for ids in documents
        if len(ids) > 1
    ]
    return torch.stack(each).sum()


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_have_the_loss_and_gradients_of_documents_alone(family: str, tmp_path: Path) -> None:
    plain, data = model(family), packed(corpus(tmp_path), 0, 72, LENGTH)
    loss = SummedLoss(plain)
    assert loss.apart
    value, expected = loss_of(loss, data, [0, 1, 2]), alone(plain, pieces(data))
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    mine, theirs = gradients(plain, value), gradients(plain, expected)
    assert mine.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max()), msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_document_does_not_feel_what_stands_before_it(family: str, tmp_path: Path) -> None:
    loss, data = SummedLoss(model(family)), packed(corpus(tmp_path), 0, 72, LENGTH)
    arrays = collate(data, [0])
    ids, positions, rows, targets = (
        torch.from_numpy(array) for array in (arrays.ids_BT, arrays.positions_BT, arrays.rows_N, arrays.targets_N)
    )
    later = rows >= 10  # the third document's
    changed = ids.clone()
    changed[0, :9] = 95 - changed[0, :9]

    def felt(at: torch.Tensor | None) -> float:
        one, other = (loss(x, at, rows[later], targets[later], 1).item() for x in (ids, changed))
        return abs(one - other)

    assert felt(positions) == 0 < 1e-3 < felt(None)


@pytest.mark.parametrize("family", ["mistral", "gemma3", "gpt2"])
def test_the_last_layer_at_the_read_positions_only_is_right_in_packed_rows(family: str, tmp_path: Path) -> None:
    plain, data = model(family), packed(corpus(tmp_path), 0, 72, LENGTH)
    few = replace(data, answers=np.array([17, 20, 18]))
    loss = SummedLoss(plain)
    assert len(collate(few, [0, 1, 2]).rows_N) == few.targets.sum() < 36
    assert loss.last_layer._modules
    value = loss_of(loss, few, [0, 1, 2])
    mine = gradients(plain, value)
    loss.last_layer._modules = []
    whole = loss_of(loss, few, [0, 1, 2])
    theirs = gradients(plain, whole)
    assert value.item() == pytest.approx(whole.item(), rel=1e-6)
    for name, gradient in theirs.items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max()), msg=name)


def test_models_that_cannot_keep_documents_apart_read_a_row_as_one_text(tmp_path: Path) -> None:
    """BLOOM takes no positions, and OPT does not show them to its mask."""
    common = {"vocab_size": 96, "hidden_size": 32}
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64, "word_embed_proj_dim": 32}
    configs = (
        transformers.BloomConfig(**common, n_layer=2, n_head=4),
        transformers.OPTConfig(**common, **shape, max_position_embeddings=64, dropout=0.0),
        transformers.MambaConfig(**common, num_hidden_layers=2),
    )
    data = packed(corpus(tmp_path), 0, 72, LENGTH)
    for config in configs:
        torch.manual_seed(0)
        plain = transformers.AutoModelForCausalLM.from_config(config).eval()
        assert not keeps_apart(plain)
        arrays = collate(data, [0])
        logits = plain(input_ids=torch.from_numpy(arrays.ids_BT), use_cache=False).logits[0]
        rows, targets = torch.from_numpy(arrays.rows_N), torch.from_numpy(arrays.targets_N)
        expected = cross_entropy(logits[rows], targets, reduction="sum")
        assert loss_of(SummedLoss(plain), data, [0]).item() == pytest.approx(expected.item(), rel=1e-5)


def test_positions_start_anew_where_a_document_or_a_row_begins_and_its_first_token_is_no_target(tmp_path: Path) -> None:
    data = packed(corpus(tmp_path), 0, 72, LENGTH)
    arrays = collate(data, [0, 2])
    assert arrays.positions_BT.tolist() == [
        [*range(9), 0, *range(14)],  # documents of 9 and 1, and 14 of the next one's 21 tokens
        [*range(15), *range(9)],
    ]
    firsts = [0, 9, 10, 24, 24 + 15]
    assert (arrays.rows_N + 1).tolist() == [i for i in range(48) if i not in firsts]
    assert (arrays.ids_BT.reshape(-1)[arrays.rows_N + 1] == arrays.targets_N).all()
    assert data.targets.tolist() == [21, 21, 22] and data.joins
    ragged = replace(data, starts=np.array([0, 31]), ends=np.array([13, 44]), answers=np.array([1, 1]), limit=None)
    assert collate(ragged, [0, 1]).positions_BT.tolist() == [[*range(9), 0, *range(6)], [*range(9), *range(7)]]


def test_rows_of_one_document_are_given_no_positions() -> None:
    tokens, offsets = np.arange(1, 60, dtype=np.uint32), np.array([0, 20, 35, 59])
    data = examples(tokens, offsets, np.array([5, 5, 5]), np.arange(3), 16)
    assert not data.joins and collate(data, [0, 1, 2]).positions_BT is None
    assert data.targets.tolist() == [15, 10, 15] == [len(collate(data, [i]).rows_N) for i in range(3)]


def test_sequences_without_a_target_are_left_out_and_counted(tmp_path: Path) -> None:
    """Two rows hold documents of one token each: the mean over their targets would be 0 / 0."""
    offsets = np.array([0, 9, *range(10, 26), 40])
    data = packed(corpus(tmp_path / "some", offsets), 0, 40, 8)
    assert (data.left_out, data.starts.tolist(), data.targets.tolist()) == (2, [0, 24, 32], [7, 6, 7])
    assert mixed({"a": data, "b": data}).left_out == 4
    with pytest.raises(StageError, match="none of 2 sequences has a token to predict"):
        packed(corpus(tmp_path / "none", np.arange(17)), 0, 16, 8)
    with pytest.raises(StageError, match="none of 1 sequences"):
        examples(np.arange(3), np.array([0, 3]), np.array([3]), np.arange(1), None)


def test_documents_of_mixed_corpora_are_named_where_they_are_asked_for(tmp_path: Path) -> None:
    """A corpus may have more documents than memory has room for names."""
    count = 300_000
    parts = {
        name: packed(corpus(tmp_path / name, 2 * np.arange(count + 1), seed), 0, 2 * count, 4)
        for seed, name in enumerate(("corpus", "replay1"))
    }
    tracemalloc.start()
    data = mixed(parts)
    assert data.documents_of([0, count // 2 + 1]) == ["corpus:100", "corpus:101", "replay1:102", "replay1:103"]
    assert collate(data, [count // 2]).ids_BT.tolist() == collate(parts["replay1"], [0]).ids_BT.tolist()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 * count  # spans and offsets; names alone took 60 bytes and more each, and as much again to join
