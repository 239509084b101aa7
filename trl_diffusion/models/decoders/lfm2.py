"""
LFM2.5-Encoder-Diffusion: LFM2, of which attention and short convolutions see both sides.

transformers' LFM2 attends to both sides with `is_causal=False`, and its convolutions see only what comes before all the
same. Here they are centred on their token. Padding is zero to them, as what is beyond the ends of a row.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, Lfm2Config, Lfm2Model, Lfm2PreTrainedModel
from transformers.models.lfm2.modeling_lfm2 import Lfm2ShortConv, apply_mask_to_padding_states

from .published_names import HeadBesideMixin


class CentredShortConv(Lfm2ShortConv):
    """A short convolution that sees as much on either side."""

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any) -> Any:
        """`(B, L, H)` hidden states; `attention_mask` `(B, L)` is one at real tokens."""
        real = apply_mask_to_padding_states(hidden_states, attention_mask)
        before, after, inner = self.in_proj(real).transpose(-1, -2).chunk(3, dim=-2)
        sides, size = self.conv_kernel_size // 2, hidden_states.shape[-1]
        mixed = nn.functional.conv1d(before * inner, self.conv.weight, self.conv.bias, padding=sides, groups=size)
        return self.out_proj((after * mixed[..., : hidden_states.shape[1]]).transpose(-1, -2))


class Lfm2BidirectionalForMaskedLM(HeadBesideMixin, Lfm2PreTrainedModel, GenerationMixin):
    """LFM2.5-Encoder-Diffusion, whose configuration is that of LFM2 but for the name of this class."""

    config: Lfm2Config
    config_class = Lfm2Config
    post_init: Callable[[], None]
    base_model_prefix = "lfm2"
    _tied_weights_keys = {"lm_head.weight": "lfm2.embed_tokens.weight"}

    def __init__(self, config: Lfm2Config):
        config.is_causal = False
        super().__init__(config)
        self.lfm2 = Lfm2Model(config)
        self.lfm2.embed_tokens.padding_idx = None  # as in `BidirectionalMixin`
        for layer in self.lfm2.layers:
            if not layer.is_attention_layer:
                layer.conv = CentredShortConv(config, layer.conv.layer_idx)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
