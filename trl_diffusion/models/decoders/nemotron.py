"""
Nemotron-Labs-Diffusion: Ministral 3, which sees both sides in the paradigm that its configuration names.

The published forward with `dlm_paradigm="bidirectional"`, the published value, hides tokens, attends to the whole
sequence and divides the cross entropy by the level of masking: an ELBO as LLaDA's. Weights were trained with
`"block_diff"`, which is another bound, and decode with causal context; `"autoregressive"` has none.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import GenerationMixin, Ministral3Config, Ministral3Model, Ministral3PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput
from transformers.utils import can_return_tuple

from .configuration import BidirectionalConfig
from .modeling import InPlaceMixin


@strict
class NemotronLabsDiffusionConfig(BidirectionalConfig, Ministral3Config):
    """Nemotron-Labs-Diffusion. The defaults are those of the 8B."""

    model_type = "nemotron_labs_diffusion"
    off: ClassVar[dict[str, Any]] = {
        **BidirectionalConfig.off,
        "attention_bias": False,
        "mlp_bias": False,
        "sliding_window": None,
    }
    is_causal: bool = False
    mask_token_id: int | None = 100
    pad_token_id: int | None = None
    eos_token_id: int | list[int] | None = 11
    dlm_paradigm: str = "bidirectional"
    block_size: int = 32

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.dlm_paradigm not in ("bidirectional", "block_diff"):
            raise ValueError(
                f"`dlm_paradigm={self.dlm_paradigm!r}` is not implemented for Nemotron-Labs-Diffusion: "
                "'autoregressive' makes it a causal model, which has no ELBO. Published checkpoints say "
                "'bidirectional': correct the entry if this is one of them."
            )


class NemotronLabsDiffusionModel(InPlaceMixin, Ministral3PreTrainedModel, GenerationMixin):
    """Nemotron-Labs-Diffusion, under the published names. The logits at a position predict the token there."""

    config: NemotronLabsDiffusionConfig
    config_class = NemotronLabsDiffusionConfig
    diffusion_head: nn.Module
    post_init: Callable[[], None]
    base_model_prefix = "encoder"
    _tied_weights_keys = {"diffusion_head.weight": "encoder.embed_tokens.weight"}

    def __init__(self, config: NemotronLabsDiffusionConfig):
        super().__init__(config)
        self.encoder = Ministral3Model(config)
        self.encoder.embed_tokens.padding_idx = None  # as in `BidirectionalMixin`
        self.diffusion_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.diffusion_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.diffusion_head = value

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """
        Args:
            input_ids, attention_mask, position_ids, inputs_embeds: as in [`~transformers.Ministral3Model`].
            labels: `(B, L)` tokens to predict in place, -100 where there is none. The loss is their mean negative
                log-probability, without the weights of the ELBO.
            logits_to_keep: number of last positions, or positions, whose logits are wanted. All by default.

        Returns:
            `logits` `(B, L, V)`.
        """
        rows = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "position_ids": position_ids}
        outputs = self.encoder(attention_mask=attention_mask, **rows, **kwargs)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.diffusion_head(outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels[:, keep], vocab_size=self.config.vocab_size, **kwargs)
        return MaskedLMOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)
