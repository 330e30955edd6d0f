"""Passes of a few new tokens: heads that share keys and values are asked together, and what is kept grows in place."""

from collections.abc import Iterator

import pytest
import torch
import transformers
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from portllm.work import attention, kv_cache
from portllm.work.attention import shared_heads
from portllm.work.kv_cache import joined, keep_columns

SHAPE = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip


@pytest.fixture(params=["llama", "gemma3"])
def model(request: pytest.FixtureRequest) -> torch.nn.Module:
    torch.manual_seed(0)
    configs = {
        "llama": transformers.LlamaConfig(**SHAPE),
        "gemma3": transformers.Gemma3TextConfig(**SHAPE, sliding_window=8),
    }
    return transformers.AutoModelForCausalLM.from_config(configs[request.param]).eval()


def passes(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Hidden states of prompts of several lengths, and of three tokens after each."""
    ids, mask = torch.arange(3, 39).view(3, 12), torch.ones(3, 12, dtype=torch.int64)
    mask[0, :5] = 0
    cache = DynamicCache()
    with torch.no_grad():
        yield model.model(input_ids=ids, attention_mask=mask, past_key_values=cache).last_hidden_state
        more = torch.cat([mask, torch.ones(3, 3, dtype=torch.int64)], dim=1)
        yield model.model(input_ids=ids[:, :3], attention_mask=more, past_key_values=cache).last_hidden_state


def test_heads_asked_together_see_what_each_sees(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    widths, together = [], attention._together
    monkeypatch.setattr(attention, "_together", lambda q, *rest: widths.append(q.shape[2]) or together(q, *rest))
    expected = list(passes(model))
    assert not widths
    with shared_heads(model):
        assert model.config._attn_implementation == "sdpa"  # by which some models choose their mask
        found = list(passes(model))
    assert 3 in widths and "sdpa" not in ALL_ATTENTION_FUNCTIONS._local_mapping
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one[1:], other[1:], atol=1e-5, rtol=0)
        torch.testing.assert_close(one[0, -3:], other[0, -3:], atol=1e-5, rtol=0)


def test_a_model_that_attends_in_its_own_way_is_left_to_it(model: torch.nn.Module) -> None:
    model.set_attn_implementation("eager")
    with shared_heads(model):
        assert model.config._attn_implementation == "eager"


def layer(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    return torch.randn(rows, 2, columns, 4), torch.randn(rows, 2, columns, 4)


def cache_of(rows: int, columns: int, seed: int) -> DynamicCache:
    cache = DynamicCache()
    cache.update(*layer(rows, columns, seed), 0)
    return cache


@pytest.mark.parametrize("room", [0, 1, 64])
def test_a_joined_cache_holds_what_copies_would(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    monkeypatch.setattr(kv_cache, "ROOM", room)
    parts = [cache_of(2, 7, 1), cache_of(1, 5, 2)]
    padded = torch.nn.functional.pad(layer(1, 5, 2)[0], (0, 0, 2, 0))
    expected = torch.cat([layer(2, 7, 1)[0], padded])
    cache = joined(parts, 7)
    assert torch.equal(cache.layers[0].keys, expected) and cache.get_seq_length() == 7
    for number in range(4):
        new = layer(3, 2, 10 + number)
        keys, _ = cache.update(*new, 0)
        expected = torch.cat([expected, new[0]], dim=2)
        assert torch.equal(keys, expected)
    order = torch.stack([torch.randperm(15)[:9] for _ in range(3)])
    keep_columns(cache, order)
    expected = torch.stack([row[:, columns] for row, columns in zip(expected, order, strict=True)])
    assert torch.equal(cache.layers[0].keys, expected)
    cache.reorder_cache(torch.tensor([2, 0]))
    new = layer(2, 3, 20)
    assert torch.equal(cache.update(*new, 0)[0], torch.cat([expected[[2, 0]], new[0]], dim=2))
