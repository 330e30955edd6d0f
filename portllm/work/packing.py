"""Several documents in one row: which models keep them apart.

transformers takes positions that start anew inside a row for the beginning of another document, and masks attention
accordingly: in every layer, sliding windows counted from the document's start, for any batch, in training as otherwise,
if neither a mask nor a cache is given. Positions that do not start anew make no mask, and nothing is given to a row
of one document: it runs as it would without any of this.

Some models do not: they take no positions (BLOOM and MPT with ALiBi, Mamba), or do not show them to their mask (OPT,
Falcon, GPT-OSS). They read a row as one text, with positions that run through it, and EOS is all that parts two
documents. Of a hybrid (LFM2, Jamba) attention keeps them apart, while its convolutions and states run on.

Shape suffixes: B rows, T tokens, D hidden size.
"""

import inspect
from typing import Any

import torch

from portllm.work.head import body

_LENGTH = 6
"""Tokens of each document of the trial."""


def keeps_apart(model: Any) -> bool:
    """Whether positions that start anew keep what stands before a document in its row from it.

    Two rows differ in their first documents only. Where these are masked, the second ones come out alike to the bit; a
    mixture of experts may round them differently, since it sorts the tokens of all documents.
    """
    if "position_ids" not in inspect.signature(body(model).forward).parameters:
        return False
    one, other, last = torch.arange(3 * _LENGTH, device=model.device).view(3, _LENGTH)
    ids_BT = torch.stack([torch.cat([one, last]), torch.cat([other, last])]) % model.config.get_text_config().vocab_size
    positions_BT = torch.arange(2 * _LENGTH, device=model.device).expand(2, -1)
    return _felt(model, ids_BT, positions_BT % _LENGTH) <= _felt(model, ids_BT, positions_BT) / 4


def _felt(model: Any, ids_BT: torch.Tensor, positions_BT: torch.Tensor) -> float:
    """How far the second documents of the two rows differ."""
    with torch.no_grad():
        outputs = body(model)(input_ids=ids_BT, position_ids=positions_BT, use_cache=False)
    first_TD, second_TD = outputs.last_hidden_state[:, _LENGTH:].float()
    return float((first_TD - second_TD).abs().max())
