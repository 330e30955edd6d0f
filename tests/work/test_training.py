"""The training loop: what decides its numbers, and what moves rounding only."""

import contextlib
import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from torch.nn.functional import cross_entropy

from portllm.engine.failures import Decision, Failure, decide
from portllm.engine.runner import smaller
from portllm.errors import Preempted, StageError
from portllm.study.recipes import Optimization
from portllm.study.resources import Layout
from portllm.study.steps import Step
from portllm.work import checkpoints, engine_state, training
from portllm.work import loss as losses_of
from portllm.work.checkpoints import complete
from portllm.work.loss import SummedLoss
from portllm.work.points import Point
from portllm.work.training import learning_rate, train
from tests.work import toy_training as toy

pytestmark = pytest.mark.real


# ----------------------------------------------------------------------------------------------------------------- loop


def plain_loop(model: Any, moves: Optimization = toy.OPTIMIZATION) -> np.ndarray:
    """The same 20 steps without DeepSpeed, padding, or a head that skips rows: one sequence at a time."""
    data = toy.data()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    losses = []
    for step, batch in enumerate(toy.batches()):
        optimizer.param_groups[0]["lr"] = learning_rate(step, toy.STEPS, moves)
        total = torch.zeros(())
        for i in batch:
            ids = torch.from_numpy(data.tokens[data.starts[i] : data.ends[i]].astype(np.int64))
            first = int(data.answers[i])
            logits = model(input_ids=ids[None]).logits[0, first - 1 : -1]
            total = total + cross_entropy(logits, ids[first:], reduction="sum")
        mean = total / int(data.targets[batch].sum())
        optimizer.zero_grad()
        mean.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), moves.clip)
        optimizer.step()
        losses.append(float(mean.detach()))
    return np.array(losses)


Fitted = tuple[Any, dict[str, Any], Path]
"""(model, ledger, directory)."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Fitted]:
    """Trainings by one process from beginning to end, each made once."""

    @functools.cache
    def fit(**settings: Any) -> Fitted:
        out = tmp_path_factory.mktemp("undisturbed")
        return *toy.fit(out, **settings), out

    return fit


@pytest.fixture(scope="module")
def reference(undisturbed: Callable[..., Fitted]) -> Fitted:
    return undisturbed()


def test_20_steps_equal_a_plain_pytorch_loop(reference: Any) -> None:
    np.testing.assert_allclose(toy.losses(reference[2]), plain_loop(toy.model()), atol=1e-5, rtol=0)


def tied() -> Any:
    """A model whose head is its embedding."""
    model = toy.model()
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


def test_a_tied_head_moves_with_its_embedding(tmp_path: Path) -> None:
    model, plain, gentle = tied(), tied(), replace(toy.OPTIMIZATION, learning_rate=2e-3)
    run = toy.context(tmp_path, Layout())
    ledger = train(model, toy.data(), toy.batches(), gentle, "full", run, tmp_path)
    np.testing.assert_allclose(toy.losses(tmp_path), plain_loop(plain, gentle), atol=1e-5, rtol=0)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert ledger["trainable_parameters"] == sum(p.numel() for p in plain.parameters())
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)


def test_a_training_that_ran_out_of_memory_has_the_same_curve_with_half_the_micro_batch(
    reference: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The retry of a step whose third forward pass finds no memory, as the engine decides it."""
    layout, passes, allocated = Layout(micro_tokens=128), [], losses_of.SummedLoss.forward

    def scarce(loss: SummedLoss, ids_BT: torch.Tensor, *others: Any) -> torch.Tensor:
        passes.append(ids_BT.numel())
        if ids_BT.numel() > 64 and len(passes) >= 3:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return allocated(loss, ids_BT, *others)

    monkeypatch.setattr(losses_of.SummedLoss, "forward", scarce)
    with pytest.raises(RuntimeError, match="can't allocate") as failed:
        toy.fit(tmp_path, layout)
    assert decide([Failure(failed.type.__name__, str(failed.value))]) is Decision.SMALLER
    retried = smaller(Step("", "finetune", "", None, {}, layout))
    assert retried.layout.budget == 64 and max(passes) > 64
    model, ledger = toy.fit(tmp_path, retried.layout)
    assert (ledger["micro_tokens"], ledger["resumed"]) == (64, [])
    np.testing.assert_allclose(toy.losses(tmp_path), toy.losses(reference[2]), atol=1e-5, rtol=0)
    for mine, theirs in zip(model.parameters(), reference[0].parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("curve", ["full", "lora", "packed"])
def test_the_losses_are_those_of_the_committed_curve(curve: Any, tmp_path: Path) -> None:
    """A refactoring of the loop moves no loss; another processor may, by rounding."""
    toy.fit(tmp_path, **({"batch": 3, "packed": True} if curve == "packed" else {"trains": curve}))
    golden = json.loads(Path(__file__).with_name("golden_losses.json").read_text())
    np.testing.assert_allclose(toy.losses(tmp_path), golden[curve], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(micro_tokens=40), Layout(micro_tokens=96), Layout(zero=1), Layout(zero=2, micro_tokens=64),
        Layout(zero=3, micro_tokens=64), Layout(offload=True), Layout(gradient_checkpointing=True),
    ],
    ids=str,
)  # fmt: skip
def test_resources_move_rounding_only(layout: Layout, reference: Any, tmp_path: Path) -> None:
    model, ledger = toy.fit(tmp_path, layout)
    np.testing.assert_allclose(toy.losses(tmp_path), toy.losses(reference[2]), atol=1e-5, rtol=0)
    for mine, theirs in zip(model.parameters(), reference[0].parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)
    assert ledger["zero"] == (layout.zero if layout.zero is not None else int(layout.offload))


SETTLED = Optimization(learning_rate=1e-3, batch=8, seed=3, weight_decay=0.1, dtype="bfloat16")


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_masters_begin_with_the_weights_and_not_with_what_bfloat16_leaves_of_them(zero: int, tmp_path: Path) -> None:
    still = replace(SETTLED, learning_rate=1e-30)
    assert same(toy.fit(tmp_path, Layout(zero=zero), optimization=still)[0], toy.model())


@pytest.fixture(scope="module")
def settled(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(model, losses) under ZeRO-1."""
    where = tmp_path_factory.mktemp("settled")
    return toy.fit(where, Layout(zero=1), optimization=SETTLED)[0], toy.losses(where)


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_the_zero_stage_moves_rounding_only_in_bfloat16_too(zero: int, settled: Any, tmp_path: Path) -> None:
    expected, losses = settled
    model, _ = toy.fit(tmp_path, Layout(zero=zero), optimization=SETTLED)
    np.testing.assert_allclose(toy.losses(tmp_path), losses, atol=2e-3, rtol=0)
    mine, theirs, begun = (
        torch.cat([p.detach().flatten() for p in one.parameters()]) for one in (model, expected, toy.model())
    )
    assert (mine - theirs).norm() < 0.05 * (theirs - begun).norm()


def test_arithmetic_is_counted_where_zero_3_has_parted_the_weights(reference: Any, tmp_path: Path) -> None:
    parted = Layout(zero=3, deepspeed={"zero_optimization": {"stage3_param_persistence_threshold": 0}})
    assert toy.fit(tmp_path, parted)[1]["flops"] == reference[1]["flops"]


def test_a_loss_scale_is_kept_under_either_name_and_nothing_before_the_first_step() -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    for name in ("loss_scale_config", "loss_scaler"):
        scale = SimpleNamespace(cur_scale=4096.0, cur_iter=7)
        optimizer = SimpleNamespace(**{name: scale})
        engine = SimpleNamespace(optimizer=optimizer, basic_optimizer=torch.optim.AdamW([weight]))
        assert not engine_state.stepped(engine)
        weight.grad = torch.ones(1)
        engine.basic_optimizer.step()
        assert engine_state.stepped(engine)
        assert engine_state.numbers(engine) == {"steps": 1.0, "cur_scale": 4096.0, "cur_iter": 7.0}


def test_the_ledger_is_read_from_the_engine(reference: Any) -> None:
    _, ledger, out = reference
    lengths = toy.data().lengths
    assert ledger["tokens"] == sum(int(lengths[b].sum()) for b in toy.batches())
    assert [ledger[name] for name in ("steps", "world", "zero", "micro_tokens")] == [20, 1, 0, 2048]
    count = sum(p.numel() for p in toy.model().parameters())
    assert ledger["trainable_parameters"] == ledger["total_parameters"] == count
    assert ledger["peak_rss_bytes"] > 2**27
    assert ledger["peak_device_bytes"] is None
    assert ledger["deepspeed"]
    points = [json.loads(line) for line in (out / "curve.jsonl").open()]
    assert [p["step"] for p in points] == list(range(1, 21))
    assert set(points[0]) == {"step", "loss", "learning_rate", "grad_norm", "tokens_per_s", "elapsed_s"}
    seen = json.loads((out / "documents.rank0.json").read_text())
    assert seen == [[100 + i for i in batch] for batch in toy.batches()]


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_bfloat16_trains_fp32_masters(zero: int, reference: Any, tmp_path: Path) -> None:
    gentle = replace(toy.OPTIMIZATION, learning_rate=1e-4, dtype="bfloat16")
    model, _ = toy.fit(tmp_path, Layout(zero=zero), optimization=gentle)
    np.testing.assert_allclose(toy.losses(tmp_path)[0], toy.losses(reference[2])[0], rtol=5e-3)
    moved = model.lm_head.weight - toy.model(dtype=torch.bfloat16).lm_head.weight.float()
    assert model.lm_head.weight.dtype == torch.float32
    # Steps of 1e-4 are lost in a bf16 weight of 0.02 (spacing 1.2e-4): only masters take them.
    assert 1e-4 < moved.abs().mean() < 2e-3
    assert not torch.equal(model.lm_head.weight.bfloat16().float(), model.lm_head.weight)


def test_a_loss_that_is_not_finite_names_step_and_documents(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"optimizer step [2-9] of 20 is (nan|inf).*\[1\d\d, 1\d\d"):
        toy.fit(tmp_path, optimization=replace(toy.OPTIMIZATION, learning_rate=1e30, clip=0.0))


def test_a_loss_that_has_left_for_good_stops_before_it_is_stepped(tmp_path: Path) -> None:
    taken: list[int] = []
    run = toy.context(tmp_path, Layout())
    run.progress = lambda number, steps, **values: taken.append(number)
    run.stop = lambda: False
    wild = replace(toy.OPTIMIZATION, learning_rate=30.0, clip=0.0)
    with pytest.raises(StageError) as stopped:
        train(toy.model(), toy.data(), toy.batches(), wild, "full", run, tmp_path)
    number, loss, names = re.search(
        r"optimizer step (\d+) of 20 is (\S+), for documents \[(.*)\]: lower", str(stopped.value)
    ).groups()
    assert 4 * np.log(120) < float(loss) < np.inf
    assert taken == list(range(1, int(number)))
    assert names == ", ".join(str(100 + i) for i in toy.batches()[int(number) - 1])


def test_a_group_of_another_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="1 ranks, this step 2"):
        toy.fit(tmp_path, world=2)


# -------------------------------------------------------------------------------------------------------- two processes


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case of `toy_training` by two processes over gloo; what one process began is there before them."""
    out = tmp_path_factory.mktemp("ranks")
    toy.halves(out, rank=0, world=1, begin=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    ranks = [
        subprocess.Popen([sys.executable, toy.__file__, str(rank), "2", str(out)], env=environment) for rank in range(2)
    ]
    assert [rank.wait(timeout=200) for rank in ranks] == [0, 0]
    return out


def undisturbed_losses(undisturbed: Callable[..., Fitted], case: dict[str, Any]) -> np.ndarray:
    """By one process, of what decides a case's numbers."""
    return toy.losses(undisturbed(**{key: case[key] for key in ("trains", "batch", "packed") if key in case})[2])


@pytest.mark.parametrize("case", toy.CASES)
def test_two_ranks_equal_one(case: str, two_ranks: Path, undisturbed: Callable[..., Fitted]) -> None:
    expected = undisturbed_losses(undisturbed, toy.CASES[case])
    np.testing.assert_allclose(toy.losses(two_ranks / case), expected, atol=1e-4, rtol=0)
    ledger = json.loads((two_ranks / case / "ledger.rank0.json").read_text())
    assert ledger["world"] == 2
    assert ledger["zero"] == (int(case[4]) if case.startswith("zero") else 3)


def test_two_ranks_read_different_documents(two_ranks: Path) -> None:
    first, second = (json.loads((two_ranks / "zero1" / f"documents.rank{r}.json").read_text()) for r in range(2))
    for mine, theirs, batch in zip(first, second, toy.batches(), strict=True):
        assert sorted(mine + theirs) == sorted(100 + i for i in batch)
        assert len(mine) == len(theirs) == 4


# --------------------------------------------------------------------------------------------------------------- resume


def same(mine: Any, theirs: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(mine.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_training_told_to_stop_goes_on_to_the_very_same_bits(zero: int, dtype: Any, tmp_path: Path) -> None:
    settings = {"layout": Layout(zero=zero, micro_tokens=96), "optimization": replace(toy.OPTIMIZATION, dtype=dtype)}
    whole, _ = toy.fit(tmp_path / "whole", **settings)
    for stop in (1, 12):
        with pytest.raises(Preempted, match=f"stopped after optimizer step {stop} of 20"):
            toy.fit(tmp_path / "halves", stop=stop, **settings)
    halves, ledger = toy.fit(tmp_path / "halves", **settings)
    assert ledger["resumed"] == [1, 12]
    assert same(halves, whole) and (toy.losses(tmp_path / "halves") == toy.losses(tmp_path / "whole")).all()


@pytest.mark.parametrize("seed", range(3))
def test_a_training_killed_at_a_random_step_equals_an_undisturbed_one(
    seed: int, reference: Any, tmp_path: Path
) -> None:
    killed = int(np.random.default_rng(seed).integers(2, 20))

    def die(number: int, steps: int, **values: float) -> None:
        if number == killed:
            raise KeyboardInterrupt

    model, run = toy.model(), toy.context(tmp_path, Layout(checkpoint_s=1e-9))
    run.progress, run.stop = die, lambda: False
    with pytest.raises(KeyboardInterrupt):
        train(model, toy.data(), toy.batches(), toy.OPTIMIZATION, "full", run, tmp_path)
    kept = complete(tmp_path / "kept")
    assert 1 <= len(kept) <= 2 and all(int(path.name.split("-")[1]) < killed for path in kept)
    model, ledger = toy.fit(tmp_path)
    assert same(model, reference[0]) and ledger["resumed"] == [int(kept[-1].name.split("-")[1])]


def test_a_checkpoint_that_is_not_finished_or_cannot_be_read_is_passed_over_and_named_where_none_is_left(
    reference: Any, tmp_path: Path
) -> None:
    with pytest.raises(Preempted):
        toy.fit(tmp_path, stop=3)
    (tmp_path / "kept" / "step-000009-of-2").mkdir()
    (tmp_path / "kept" / "step-000009-of-2" / "rank1.safetensors").write_bytes(b"half")
    with pytest.raises(Preempted):
        toy.fit(tmp_path, stop=5)
    with pytest.raises(Preempted):
        toy.fit(tmp_path, stop=7)
    spoil(complete(tmp_path / "kept")[-1])
    model, ledger = toy.fit(tmp_path)
    assert ledger["resumed"] == [3, 5] and same(model, reference[0])
    for path in complete(tmp_path / "kept"):
        spoil(path)
    with pytest.raises(StageError, match="step-000005-of-1: no checkpoint to go on from"):
        toy.fit(tmp_path)


def spoil(checkpoint: Path) -> None:
    (checkpoint / "rank0.safetensors").chmod(0o644)
    (checkpoint / "rank0.safetensors").write_bytes(b"garbage")


def test_two_whole_checkpoints_lie_there_while_a_third_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "PATIENCE", 0)
    seen = []
    monkeypatch.setattr(os, "fsync", lambda file: seen.append(len(complete(tmp_path / "kept"))))
    toy.fit(tmp_path, Layout(checkpoint_s=1e-9))
    assert seen[:2] == [0, 1] and set(seen[2:]) == {2} and len(complete(tmp_path / "kept")) == 2


def test_checkpoints_are_ordered_by_their_step(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000):
        (tmp_path / f"step-{step:06}-of-1").mkdir()
        (tmp_path / f"step-{step:06}-of-1" / "rank0.safetensors").touch()
    assert [path.name for path in complete(tmp_path)] == ["step-999999-of-1", "step-1000000-of-1"]


def test_the_ledger_counts_what_earlier_attempts_spent(tmp_path: Path) -> None:
    clock = iter(np.arange(0.0, 1e6, 1.0))  # a second passes each time that somebody looks
    ledgers = {}
    for name, stops in (("whole", []), ("halves", [5, 12])):
        for stop in [*stops, None]:
            run = replace(toy.context(tmp_path / name, Layout(), stop=stop), clock=lambda: float(next(clock)))
            (tmp_path / name).mkdir(exist_ok=True)
            with contextlib.suppress(Preempted):
                ledgers[name] = train(
                    toy.model(), toy.data(), toy.batches(), toy.OPTIMIZATION, "full", run, tmp_path / name
                )
    whole, halves = ledgers["whole"], ledgers["halves"]
    assert whole["earlier_s"] == 0 and 0 < halves["earlier_s"] < halves["train_s"]
    assert halves["train_s"] == pytest.approx(whole["train_s"], rel=0.1)
    assert halves["peak_rss_bytes"] > 0


def test_gradients_that_are_not_finite_stop_the_step_though_the_loss_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "gradient_norm", lambda engine: float("inf"))
    with pytest.raises(StageError, match=r"norm of the gradients at optimizer step 1 of 20 is inf, for documents \[1"):
        toy.fit(tmp_path)


def test_a_disk_that_is_full_costs_the_checkpoint_and_not_the_training(
    reference: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    model, _ = toy.fit(tmp_path, Layout(checkpoint_s=1e-9))
    assert same(model, reference[0]) and not complete(tmp_path / "kept")
    assert not list((tmp_path / "kept").rglob("*.partial"))


def test_a_disk_that_is_full_is_heard_of_in_the_writer_s_own_words(
    reference: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    said: list[str] = []
    run = replace(toy.context(tmp_path, Layout(checkpoint_s=1e-9)), log=said.append)
    model = toy.model()
    train(model, toy.data(), toy.batches(), toy.OPTIMIZATION, "full", run, tmp_path)
    assert same(model, reference[0]) and any("no checkpoint of optimizer step" in line for line in said)


def test_an_unreadable_checkpoint_is_set_aside_and_costs_no_later_one(tmp_path: Path) -> None:
    with pytest.raises(Preempted):
        toy.fit(tmp_path, stop=3)
    with pytest.raises(Preempted):
        toy.fit(tmp_path, stop=9)
    spoil(complete(tmp_path / "kept")[-1])
    with pytest.raises(Preempted):
        toy.fit(tmp_path, stop=4)
    assert [path.name for path in complete(tmp_path / "kept")] == ["step-000003-of-1", "step-000004-of-1"]


def test_nothing_of_zero_3_is_left_in_the_process(tmp_path: Path) -> None:
    before = torch.nn.functional.linear
    toy.fit(tmp_path, Layout(zero=3))
    assert torch.nn.functional.linear is before


@pytest.mark.parametrize("case", toy.RESUMED)
def test_a_training_goes_on_with_another_number_of_ranks(
    case: str, two_ranks: Path, undisturbed: Callable[..., Fitted]
) -> None:
    settings = toy.RESUMED[case]
    if settings["then"] == 1:
        only = {key: value for key, value in settings.items() if key not in ("begun", "then")}
        _, ledger = toy.fit(two_ranks / case, **only)
    else:
        ledger = json.loads((two_ranks / case / "ledger.rank0.json").read_text())
    assert (ledger["resumed"], ledger["world"], ledger["steps"]) == (
        [7],
        settings["then"],
        len(toy.batches(settings.get("batch", 8))),
    )
    assert ledger["earlier_s"] > 0
    assert ledger["earlier_rank_s"] == pytest.approx(settings["begun"] * ledger["earlier_s"], abs=0.01)
    expected = undisturbed_losses(undisturbed, settings)
    np.testing.assert_allclose(toy.losses(two_ranks / case), expected, atol=1e-4, rtol=0)


def test_a_checkpoint_of_before_points_told_their_time_is_gone_on_from():
    kept = {"step": 1, "loss": 2.0, "learning_rate": 1e-3, "grad_norm": 1.0, "tokens": 10, "seconds": 0.5}
    assert Point(**kept).values()["elapsed_s"] == 0.0
