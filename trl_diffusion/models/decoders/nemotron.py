"""
Nemotron-Labs-Diffusion: Ministral 3, which sees both sides in the paradigm that its configuration names.

The published forward with `dlm_paradigm="bidirectional"`, the published value, hides tokens, attends to the whole
sequence and divides the cross entropy by the level of masking: an ELBO as LLaDA's. Weights were trained with
`"block_diff"`, which is another bound, and decode with causal context; `"autoregressive"` has none.
"""

from collections.abc import Callable
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import GenerationMixin, Ministral3Config, Ministral3Model, Ministral3PreTrainedModel

from .configuration import BidirectionalConfig
from .published_names import HeadBesideMixin


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


class NemotronLabsDiffusionModel(HeadBesideMixin, Ministral3PreTrainedModel, GenerationMixin):
    """Nemotron-Labs-Diffusion, under the published names. The logits at a position predict the token there."""

    config: NemotronLabsDiffusionConfig
    config_class = NemotronLabsDiffusionConfig
    post_init: Callable[[], None]
    base_model_prefix = "encoder"
    head_name = "diffusion_head"
    _tied_weights_keys = {"diffusion_head.weight": "encoder.embed_tokens.weight"}

    def __init__(self, config: NemotronLabsDiffusionConfig):
        super().__init__(config)
        self.encoder = Ministral3Model(config)
        self.encoder.embed_tokens.padding_idx = None  # as in `BidirectionalMixin`
        self.diffusion_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
