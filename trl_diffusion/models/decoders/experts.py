"""
LLaDA-MoE: the layers of Qwen3, with experts in the place of the feed-forward layer.

transformers keeps the experts of a layer in two tensors. Here each is a module of its own, as in the published code:
its `nn.Linear` layers can be quantised by bitsandbytes and adapted by PEFT under their published names, and tensors are
read and written as they are.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

from .configuration import LLaDAMoEConfig
from .modeling import InPlaceMixin


class SparseMLP(nn.Module):
    """
    Experts, of which each token is given to those that the router finds likeliest, and answered with their sum.

    It is weighed with their probabilities as they are, which are not made to sum to one (`norm_topk_prob=False`). What
    a token is answered does not depend on the others. Nothing is added in an order that is left to the device, so that
    a policy that is its reference is routed and scored as that is, bit for bit.
    """

    def __init__(self, config: Any):
        super().__init__()
        self.per_token = config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(Qwen3MLP(config) for _ in range(config.num_experts))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        tokens = hidden_states.flatten(0, -2)
        probabilities = self.gate(tokens).softmax(-1, dtype=torch.float32)
        weights, chosen = probabilities.topk(self.per_token, dim=-1)
        order = chosen.flatten().argsort(stable=True)
        answers = self._answers(tokens[order // self.per_token], chosen.flatten()[order])
        answers = answers[order.argsort()].unflatten(0, chosen.shape)
        return torch.einsum("tk,tkh->th", weights.to(answers.dtype), answers).view(hidden_states.shape)

    def _answers(self, rows: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """Of each row, that of its expert. All are asked, if for nothing: processes wait for each other's weights."""
        starts = torch.searchsorted(experts, torch.arange(len(self.experts), device=experts.device)).tolist()
        # The last is not counted, so that without numbers all rows are its own
        sizes = [end - start for start, end in pairwise([*starts, len(rows)])]
        parts = zip(self.experts, rows.split(sizes), strict=True)
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
