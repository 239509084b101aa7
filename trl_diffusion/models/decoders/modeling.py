"""
Bidirectional decoders: the layers of transformers under the published names of classes and tensors.

Logits stand where the published classes put them; what they predict there is in the record of the family.
"""

from typing import Any

import torch
from transformers import LlamaForCausalLM, Qwen2ForCausalLM, Qwen2Tokenizer, Qwen3ForCausalLM
from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss

from ..families import refuse_unscored
from ..sampler import DiffusionGenerationMixin
from ..whole import WholeCheckpointMixin
from .configuration import A2DLlamaConfig, A2DQwen2Config, A2DQwen3Config, DreamConfig, ILLaDAConfig


class BidirectionalMixin(WholeCheckpointMixin, DiffusionGenerationMixin):
    """Put in front of a causal class of transformers, whose configuration has `is_causal=False`."""

    def __init__(self, config: Any):
        refuse_unscored(config)
        super().__init__(config)
        # Where padding is the end of text, its embedding has to keep learning
        for module in self.modules():
            if isinstance(module, torch.nn.Embedding):
                module.padding_idx = None


class InPlaceMixin(BidirectionalMixin):
    """The logits at a position predict the token there, and so `labels` are its own."""

    loss_function = staticmethod(ForMaskedLMLoss)


class ILLaDAForCausalLM(InPlaceMixin, LlamaForCausalLM):
    """iLLaDA (arXiv 2606.25331)."""

    config_class = ILLaDAConfig


class DreamModel(BidirectionalMixin, Qwen2ForCausalLM):
    """Dream, Dream-Coder and DiffuCoder. The logits at a position predict the token after it, and so do `labels`."""

    config_class = DreamConfig
    loss_function = staticmethod(ForCausalLMLoss)


class A2DQwen2LMHeadModel(InPlaceMixin, Qwen2ForCausalLM):
    """A converted Qwen2."""

    config_class = A2DQwen2Config


class A2DQwen3LMHeadModel(InPlaceMixin, Qwen3ForCausalLM):
    """A converted Qwen3."""

    config_class = A2DQwen3Config


class A2DLlamaLMHeadModel(InPlaceMixin, LlamaForCausalLM):
    """A converted Llama."""

    config_class = A2DLlamaConfig


class DreamTokenizer(Qwen2Tokenizer):
    """Qwen2's, under the name by which the published folders ask for it; theirs is remote code that does the same."""
