"""The loss through the head: cross-entropy's value and gradients, without all logits."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from portllm.errors import StageError
from portllm.work import head
from portllm.work import loss as losses_of
from portllm.work.batches import collate
from portllm.work.loss import SummedLoss
from tests.work import toy_training as toy

pytestmark = pytest.mark.real


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("bias", [False, True])
def test_the_loss_in_blocks_has_cross_entropy_s_value_and_gradients(
    monkeypatch: pytest.MonkeyPatch, cap: float | None, bias: bool
) -> None:
    model = toy.model()
    if bias:
        model.lm_head.bias = nn.Parameter(torch.linspace(-1, 1, len(model.lm_head.weight)))
    arrays = collate(toy.data(), list(range(12)))
    ids, rows, targets = [torch.from_numpy(a) for a in (arrays.ids_BT, arrays.rows_N, arrays.targets_N)]

    def gradients(value: torch.Tensor) -> list[torch.Tensor]:
        model.zero_grad()
        (3 * value).backward()
        return [p.grad.clone() for p in model.parameters()]

    loss = SummedLoss(model)
    loss.head._cap = cap
    logits = model.lm_head(model.model(input_ids=ids).last_hidden_state.flatten(0, 1)[rows])
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    whole = cross_entropy(logits, targets, reduction="sum")
    words = len(model.lm_head.weight)
    for module, name, size in ((head, "LOGITS", 5 * words), (head, "CACHED", 2 * words), (losses_of, "BLOCK_ROWS", 7)):
        monkeypatch.setattr(module, name, size)
    blocks = loss(ids, None, rows, targets, 1)
    assert blocks.item() == pytest.approx(whole.item(), rel=1e-6)
    torch.testing.assert_close(gradients(blocks), gradients(whole), rtol=1e-4, atol=1e-5)
    assert loss(ids, None, rows[:0], targets[:0], 1).item() == 0


def test_a_head_that_must_be_called_has_the_same_loss_in_any_number_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under ZeRO-3, where a weight is whole only while its module runs."""
    model = toy.model()
    loss = SummedLoss(model)
    loss.head._cap = 2.0
    arrays = collate(toy.data(), list(range(12)))
    ids, rows, targets = [torch.from_numpy(a) for a in (arrays.ids_BT, arrays.rows_N, arrays.targets_N)]
    expected = loss(ids, None, rows, targets, 1).item()
    model.lm_head.weight.ds_id = 0
    assert loss.head.parameters is None
    found = []
    for blocks in (1, 5):
        model.zero_grad()
        value = loss(ids, None, rows, targets, blocks)
        value.backward()
        assert value.item() == pytest.approx(expected, rel=1e-6)
        found.append(model.model.embed_tokens.weight.grad.clone())
    torch.testing.assert_close(*found)
    monkeypatch.setattr(losses_of, "BLOCK_LOGITS", 1200)
    assert losses_of.head_blocks(model, 25) == 3


@pytest.mark.parametrize("cap", [None, 8.0])
def test_slopes_in_bfloat16_are_those_of_autograd_within_their_rounding(cap: float | None) -> None:
    """Logits up to 10 are off by half a spacing of 2⁻⁴, so a probability by 3 %; a slope itself has 8 bits."""
    model = toy.model(dtype=torch.bfloat16)
    torch.manual_seed(1)
    hidden_PD, targets_P = torch.randn(50, 32, dtype=torch.bfloat16), torch.randint(0, 120, (50,))
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # of 0.02: logits of a few units, as a trained model has them
    logits_PV = (hidden_PD.float() @ model.lm_head.weight.float().T).detach().requires_grad_()
    capped_PV = logits_PV if cap is None else cap * torch.tanh(logits_PV / cap)
    loss = cross_entropy(capped_PV, targets_P, reduction="sum")
    loss.backward()
    made = head.Head(model)
    made._cap = cap
    with torch.no_grad():
        ((here, log_P, slope_PV),) = made.slopes(hidden_PD, targets_P)
    assert (here, slope_PV.dtype, log_P.dtype) == (slice(0, 50), torch.bfloat16, torch.float32)
    assert 4 < logits_PV.abs().max() < 16
    assert float(-log_P.sum()) == pytest.approx(loss.item(), rel=2e-3)
    torch.testing.assert_close(slope_PV.float(), logits_PV.grad, rtol=0.05, atol=1e-3)


def test_a_second_backward_pass_through_one_loss_is_an_error() -> None:
    """Its gradients were scaled in place and given away: they would be added to what they were."""
    loss = SummedLoss(toy.model())
    arrays = collate(toy.data(), [3, 5])
    value = loss(torch.from_numpy(arrays.ids_BT), None, *map(torch.from_numpy, (arrays.rows_N, arrays.targets_N)), 1)
    (2 * value).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="given away"):
        value.backward()


SMALL = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
         "num_attention_heads": 2, "num_key_value_heads": 2}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("Cohere", {"logit_scale": 0.25}), ("Cohere2", {"logit_scale": 0.25}), ("Granite", {"logits_scaling": 4.0}),
        ("HyperCLOVAX", {"logits_scaling": 0.25}), ("Gemma2", {"final_logit_softcapping": 2.0, "head_dim": 8}),
    ],
)  # fmt: skip
def test_logits_scaled_or_capped_after_the_head_give_the_loss_and_slopes_of_the_model_itself(name, more) -> None:
    import transformers

    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**SMALL, **more))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(50)  # of 0.02
    ids, targets = torch.randint(0, 50, (2, 9)), torch.randint(0, 50, (18,))
    logits_PV = model(input_ids=ids, use_cache=False).logits.flatten(0, 1).float()
    assert logits_PV.abs().max() > 0.5
    cross_entropy(logits_PV, targets, reduction="sum").backward()
    exact = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    loss = SummedLoss(model)(ids, None, torch.arange(18), targets, 2)
    loss.backward()
    assert loss.item() == pytest.approx(cross_entropy(logits_PV, targets, reduction="sum").item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, exact[name], rtol=1e-4, atol=1e-5)
    hidden = head.body(model)(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
    with torch.no_grad():
        logs, _ = head.Head(model).score(hidden, targets, torch.arange(18))
    torch.testing.assert_close(logs, torch.log_softmax(logits_PV, 1)[torch.arange(18), targets].detach())


def test_an_architecture_that_changes_its_logits_otherwise_is_refused() -> None:
    model = toy.model()
    model.lm_head.register_forward_hook(lambda module, given, logits: logits + logits.roll(1, dims=-1))
    model.lm_head.forward = lambda hidden: hidden @ model.lm_head.weight.T
    with pytest.raises(StageError, match="changes its logits"):
        SummedLoss(model)
