"""
What a GPU holds otherwise than the CPU, on the CPU: for steps that are counted and not run.

- TRL's kernel of the output head works on tiles of logits in place, where the CPU makes several copies of each.
- PEFT leaves the inputs of 4-bit layers in their precision under autocast, which it looks for on a GPU only.
- Dropout keeps a mask of one byte for each number, where the CPU keeps numbers, and attention with dropout none at all,
  where the CPU falls back on all scores.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..scoring.door import replaced, tiles_in_place

_attention = torch.nn.functional.scaled_dot_product_attention


@contextmanager
def as_on_a_gpu(autocasts: bool) -> Iterator[None]:
    """
    Let a step on the CPU make the tensors that one on a GPU makes. Its numbers mean nothing.

    Args:
        autocasts: whether the step runs under autocast.
    """
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", autocasts)
    functions = {"dropout": _dropout, "scaled_dot_product_attention": _attention_without_dropout}
    try:
        with tiles_in_place(), replaced("torch.nn.functional", functions):
            yield
    finally:
        torch.set_autocast_enabled("cuda", before)


def _dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    return torch.native_dropout(input, p, training)[0] if training and p else input


def _attention_without_dropout(*args: Any, dropout_p: float = 0.0, **kwargs: Any) -> torch.Tensor:
    return _attention(*args, **kwargs)
