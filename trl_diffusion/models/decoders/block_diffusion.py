"""
Block diffusion: decoders of transformers that see their own block, and what is before it.

How a score or a generated block is made of them is in `models/blocks.py`. Here is what they are when they are called.
"""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM
from transformers.loss.loss_utils import ForCausalLMLoss

from ..blocks import block_causal
from ..families import blocks_of
from .configuration import DreamReasonerConfig, FastDLLMQwenConfig, SDARConfig
from .modeling import BidirectionalMixin, InPlaceMixin


class BlockDiffusionMixin(BidirectionalMixin):
    """Of block diffusion models: without a mask of one's own a token sees its block and those before it, as given."""

    def forward(
        self, input_ids: torch.Tensor | None = None, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Run rows as the causal class of transformers does, whose arguments these are."""
        if input_ids is not None and (attention_mask is None or attention_mask.dim() == 2):
            real = torch.ones_like(input_ids).bool() if attention_mask is None else attention_mask.bool()
            numbers = blocks_of(self.config, real, real)
            assert numbers is not None
            attention_mask = block_causal(self, numbers, real)
        return super().forward(input_ids, attention_mask, **kwargs)


class SDARForCausalLM(BlockDiffusionMixin, InPlaceMixin, Qwen3ForCausalLM):
    """SDAR (arXiv 2510.06303)."""

    config_class = SDARConfig


class DreamReasonerForCausalLM(BlockDiffusionMixin, InPlaceMixin, Qwen3ForCausalLM):
    """DreamReasoner (arXiv 2606.19257)."""

    config_class = DreamReasonerConfig


class StableDiffcoderForCausalLM(BlockDiffusionMixin, InPlaceMixin, LlamaForCausalLM):
    """Stable-DiffCoder (arXiv 2601.15892), whose configuration is that of Llama but for the name of this class."""

    config_class = LlamaConfig


class Fast_dLLM_QwenForCausalLM(BlockDiffusionMixin, Qwen2ForCausalLM):  # its published name
    """Fast-dLLM v2 (arXiv 2509.26328). The logits at a position predict the token after it, and so do `labels`."""

    config_class = FastDLLMQwenConfig
    loss_function = staticmethod(ForCausalLMLoss)
