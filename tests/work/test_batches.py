"""What makes which global batch, and what a rank reads of it."""

from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from portllm.errors import StageError
from portllm.work.batches import PAD_MULTIPLE, collate, finetune_batches, micro_batches, packed, padded, update_batches
from portllm.work.training import learning_rate
from tests.work import toy_training as toy

pytestmark = pytest.mark.real


def test_finetuning_batches_hold_like_lengths_and_every_example_once_an_epoch() -> None:
    lengths = np.random.default_rng(0).integers(5, 200, 1600)
    batches = finetune_batches(lengths, 16, steps=200, seed=7)
    assert batches == finetune_batches(lengths, 16, steps=200, seed=7) != finetune_batches(lengths, 16, 200, seed=8)
    assert np.bincount(np.concatenate(batches)).tolist() == [2] * 1600
    spread = [np.ptp(lengths[batch]) for batch in batches]
    assert np.mean(spread) < 20 < np.mean([np.ptp(lengths[i : i + 16]) for i in range(0, 1600, 16)])
    first = [lengths[batch].mean() for batch in batches[:50]]
    assert first != sorted(first)


def test_update_batches_hold_every_sequence_once() -> None:
    batches = update_batches(21, 4, seed=1)
    assert [len(b) for b in batches] == [4] * 5 + [1]
    assert sorted(i for b in batches for i in b) == list(range(21))


def test_ranks_share_a_batch_without_overlap_in_equally_many_passes_within_the_budget() -> None:
    data = toy.data()
    shares = micro_batches(data, list(range(13)), world=2, budget=64)
    assert [sorted(chain(*share)) for share in shares] == [list(range(0, 13, 2)), list(range(1, 13, 2))]
    assert len(shares[0]) == len(shares[1]) > 1
    for micro in chain(*shares):
        lengths = data.lengths[micro].tolist()
        assert lengths == sorted(lengths, reverse=True)
        assert len(micro) * padded(max(lengths, default=0), 64) <= 64 or len(micro) == 1
    assert micro_batches(data, [9], world=2, budget=1) == [[[9]], [[]]]


def test_arrays_hold_the_targets_of_the_answer_only_and_few_shapes() -> None:
    data = toy.data()
    arrays = collate(data, [3, 5])
    assert arrays.ids_BT.shape[1] % PAD_MULTIPLE == 0
    assert len(arrays.rows_N) == len(arrays.targets_N) == data.targets[[3, 5]].sum()
    assert (arrays.ids_BT.reshape(-1)[arrays.rows_N + 1] == arrays.targets_N).all()


def test_packed_sequences_take_a_slice_and_name_its_documents(tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", np.arange(100, dtype=np.uint32))
    np.save(tmp_path / "offsets.npy", np.array([0, 30, 45, 100]))
    np.save(tmp_path / "rows.npy", np.array([7, 8, 9]))
    data = packed(tmp_path, start=20, tokens=50, length=16)
    assert len(data) == 3
    assert collate(data, [0]).ids_BT.tolist() == [list(range(20, 36))]
    assert [data.documents_of([i]) for i in range(3)] == [[7, 8], [8, 9], [9]]
    with pytest.raises(StageError, match="has 100 tokens"):
        packed(tmp_path, start=60, tokens=50, length=16)


def test_schedules_warm_up_and_end_as_named() -> None:
    rates = [learning_rate(s, 100, replace(toy.OPTIMIZATION, warmup=0.1)) for s in range(100)]
    assert rates[:3] == pytest.approx([1e-3, 2e-3, 3e-3])
    assert max(rates) == rates[9] == rates[10] == 1e-2
    assert rates[55] == pytest.approx(5e-3)
    assert learning_rate(55, 100, replace(toy.OPTIMIZATION, warmup=0.1, schedule="linear")) == pytest.approx(5e-3)
    assert learning_rate(99, 100, replace(toy.OPTIMIZATION, warmup=0.0, schedule="constant")) == 1e-2
