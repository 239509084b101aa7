"""
Coupled draws in a batch of many responses to one prompt: their noise adds up in the mean.

`couple_pairs` gives responses to one prompt the same mask levels, so that noise that the two responses of a pair share
leaves their difference. Between pairs of one prompt it works the other way: errors that would have averaged out are the
same for all of them.
"""

from typing import Any

import torch
from accelerate.logging import get_logger

from ..estimators.hashing import hash_rows

logger = get_logger(__name__)

_READ = ("input_ids", "attention_mask", "completion_mask")


class CouplingWatch:
    """
    Looks at micro-batches until one holds more responses to a prompt than a pair has, and warns once, with the number.

    Args:
        enabled: whether draws are coupled.
    """

    def __init__(self, enabled: bool):
        self.enabled = enabled

    def look(self, inputs: dict[str, Any]) -> None:
        """At `input_ids`, `attention_mask` and `completion_mask`, `(B, L)` each."""
        if not self.enabled:
            return
        number = responses_to_one_prompt(*(inputs[name] for name in _READ))
        if number > 2:
            self.enabled = False
            logger.warning(
                "A micro-batch holds %d responses to one prompt, and `couple_pairs=True` gives all of them the same "
                "mask levels: between pairs of one prompt that raises the noise of the mean instead of lowering it. "
                "Set `couple_pairs=False`, or spread the rows of a prompt over batches. This warning is shown once.",
                number,
            )


def responses_to_one_prompt(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, completion_mask: torch.Tensor
) -> int:
    """The largest number of rows `(B, L)` that have the same prompt."""
    prompts = hash_rows(input_ids, attention_mask.bool() & ~completion_mask.bool())
    return int(prompts.unique(return_counts=True)[1].max())
