"""A model under published names of its own: a backbone, and an output head beside it."""

from typing import Any, ClassVar

import torch
from torch import nn
from transformers.modeling_outputs import MaskedLMOutput
from transformers.utils import can_return_tuple

from .modeling import InPlaceMixin


class HeadBesideMixin(InPlaceMixin):
    """
    Put in front of a `PreTrainedModel` that has a backbone under its `base_model_prefix`, and a head under `head_name`.

    The logits at a position predict the token there.
    """

    config: Any
    head_name: ClassVar[str] = "lm_head"

    def get_output_embeddings(self) -> nn.Module:
        return getattr(self, self.head_name)

    def set_output_embeddings(self, value: nn.Module) -> None:
        setattr(self, self.head_name, value)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: int | torch.Tensor | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """
        Args:
            input_ids, attention_mask: as in the backbone, whose other arguments are taken too.
            labels: `(B, L)` tokens to predict in place, -100 where there is none. The loss is their mean negative
                log-probability, without the weights of the ELBO.
            logits_to_keep: number of last positions, or positions, whose logits are wanted. All by default.
            num_items_in_batch: what to divide the summed loss by, instead of the number of labels.

        Returns:
            `logits` `(B, L, V)`.
        """
        backbone: Any = self.base_model
        outputs = backbone(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.get_output_embeddings()(outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            of = {"vocab_size": self.config.vocab_size, "num_items_in_batch": num_items_in_batch}
            loss = self.loss_function(logits, labels[:, keep], **of)
        return MaskedLMOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)
