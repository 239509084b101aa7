"""
Likelihood displacement: both responses lose probability, the rejected one faster, and the loss falls all the same.

The loss knows the difference of two responses only, so that margins and accuracies rise while the probability goes to
texts that nobody compared. What shows it is the change of the chosen responses' ELBO itself, per token.
"""

from typing import Any

import torch
from accelerate.logging import get_logger
from transformers import TrainerCallback

from ..scoring.head import ELBOHeadOutput

logger = get_logger(__name__)

CHOSEN = "elbo/change_chosen"
REJECTED = "elbo/change_rejected"
_MARGIN = "rewards/margins"
_CURES = {
    True: "the SFT term or a larger weight of it (`loss_type=['sigmoid', 'sft']`, `loss_weights`)",
    False: "among the desirable rows, answers to prompts that the model solves already",
}


def change_per_token(output: ELBOHeadOutput, reference: torch.Tensor) -> torch.Tensor:
    """`(B,)` nats per token that the ELBO of each response has gained on that of the `reference` `(B,)`."""
    assert output.label_mask is not None
    return (output.log_probs.detach().sum(1) - reference) / output.label_mask.sum(1)


class DisplacementWatch(TrainerCallback):
    """
    Warns once when chosen responses have lost more than a limit while margins have risen.

    Args:
        limit: nats per token.
        pairs: whether responses are compared in pairs, as against single, marked ones.
    """

    def __init__(self, limit: float, pairs: bool = True):
        self.limit, self._cure = limit, _CURES[pairs]
        self._has_warned = False

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        change, margin = ((logs or {}).get(name) for name in (CHOSEN, _MARGIN))
        if self._has_warned or change is None or margin is None or change >= -self.limit or margin <= 0:
            return
        self._has_warned = True
        logger.warning(
            "Likelihood displacement: at step %d the chosen responses have lost %.3f nats per token since the start, "
            "more than `displacement_warning=%g`, while `%s` rose to %.3f. The probability goes to texts that nobody "
            "compared, and generations may break; margins do not show it. Read some answers. Against it: %s, a lower "
            "`learning_rate`, or stop earlier; see docs/preventing-collapse.md.",
            *(state.global_step, -change, self.limit, _MARGIN, margin, self._cure),
        )
