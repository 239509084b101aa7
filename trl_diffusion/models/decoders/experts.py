"""
LLaDA-MoE: the layers of Qwen3, with experts in the place of the feed-forward layer. How experts answer is LLaDA2's too.

transformers keeps the experts of a layer in two tensors. Here each is a module of its own, as in the published code:
its `nn.Linear` layers can be quantised by bitsandbytes and adapted by PEFT under their published names, and tensors are
read and written as they are. The router is transformers', and none, so that neither finds it: a token that is given to
other experts has another score.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from .configuration import LLaDAMoEConfig
from .modeling import InPlaceMixin


class SparseMLP(nn.Module):
    """
    Experts, of which each token is given to those that the router finds likeliest, and answered with their sum.

    It is weighed with their probabilities as they are, which are not made to sum to one (`norm_topk_prob=False`).
    """

    def __init__(self, config: Any):
        super().__init__()
        self.gate = Qwen3MoeTopKRouter(config)
        nn.init.normal_(self.gate.weight, std=config.initializer_range)  # other layers are drawn by transformers
        self.experts = nn.ModuleList(Qwen3MLP(config) for _ in range(config.num_experts))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        tokens = hidden_states.flatten(0, -2)
        _, weights, chosen = self.gate(tokens)
        return weighed_answers(self.experts, tokens, weights, chosen).view(hidden_states.shape)


def weighed_answers(
    experts: nn.ModuleList, tokens: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor
) -> torch.Tensor:
    """
    `(T, H)` sums of what each token's experts answer.

    What a token is answered does not depend on the others. Nothing is added in an order that is left to the device, so
    that a policy that is its reference is scored as that is, bit for bit.

    Args:
        experts: feed-forward layers.
        tokens: `(T, H)`.
        weights: `(T, k)` of each answer.
        chosen: `(T, k)` int64, which experts a token is given to.
    """
    order = chosen.flatten().argsort(stable=True)
    answers = _answers(experts, tokens[order // chosen.shape[-1]], chosen.flatten()[order])
    answers = answers[order.argsort()].unflatten(0, chosen.shape)
    return torch.einsum("tk,tkh->th", weights.to(answers.dtype), answers)


def _answers(experts: nn.ModuleList, rows: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Of each row, that of its expert. All are asked, if for nothing: processes wait for each other's weights."""
    starts = torch.searchsorted(numbers, torch.arange(len(experts), device=numbers.device)).tolist()
    # The last is not counted, so that without numbers all rows are its own
    sizes = [end - start for start, end in pairwise([*starts, len(rows)])]
    parts = zip(experts, rows.split(sizes), strict=True)
    return torch.cat([expert(part) for expert, part in parts])


class LLaDAMoEModelLM(InPlaceMixin, Qwen3ForCausalLM):
    """LLaDA-MoE (arXiv 2509.24389)."""

    config_class = LLaDAMoEConfig

    def __init__(self, config: LLaDAMoEConfig):
        super().__init__(config)
        model: Any = self
        for layer in model.model.layers:
            layer.mlp = SparseMLP(config)
        model.post_init()
