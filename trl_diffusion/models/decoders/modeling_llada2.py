"""
LLaDA2 with the published names of modules and tensors, natively on transformers.

Queries, keys and values are one projection, normed by head, and half of each head is turned by position. Experts are
modules of their own, so that their linear layers can be quantised and adapted. The router computes in float32.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, eager_attention_forward
from transformers.utils.output_capturing import capture_outputs

from .block_diffusion import BlockDiffusionMixin
from .configuration_llada2 import LLaDA2MoeConfig
from .experts import weighed_answers
from .published_names import HeadBesideMixin


class LLaDA2MoeMLP(nn.Module):
    """A feed-forward layer of a given width."""

    def __init__(self, config: LLaDA2MoeConfig, width: int):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate = nn.functional.silu(self.gate_proj(hidden_states))
        return self.down_proj(gate * self.up_proj(hidden_states))


class LLaDA2MoeGate(nn.Module):
    """
    The router: which experts a token is given to, and what each of them weighs.

    Its weight is no linear layer, so that neither bitsandbytes nor PEFT finds it. The bias counts where experts are
    chosen and not in what they weigh, and has no gradient, as in the published code.
    """

    def __init__(self, config: LLaDA2MoeConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.expert_bias = nn.Buffer(torch.zeros(config.num_experts, dtype=torch.float32))

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`(T, k)` weights in float32, and the experts."""
        config = self.config
        with torch.autocast(tokens.device.type, enabled=False):
            scores = nn.functional.linear(tokens.float(), self.weight.float()).sigmoid()
        by_group = (scores + self.expert_bias.float()).unflatten(-1, (config.n_group, -1))
        groups = by_group.topk(2, dim=-1).values.sum(-1).topk(config.topk_group, dim=-1).indices
        kept = torch.zeros_like(by_group[..., 0], dtype=torch.bool).scatter(-1, groups, True)
        by_group = by_group.masked_fill(~kept.unsqueeze(-1), -torch.inf)
        chosen = by_group.flatten(-2).topk(config.num_experts_per_tok, dim=-1).indices
        weights = scores.gather(-1, chosen)
        return weights / (weights.sum(-1, keepdim=True) + 1e-20) * config.routed_scaling_factor, chosen


class LLaDA2MoeSparseMoeBlock(nn.Module):
    """Experts that are chosen, and one that all tokens share."""

    def __init__(self, config: LLaDA2MoeConfig):
        super().__init__()
        width = config.moe_intermediate_size
        self.gate = LLaDA2MoeGate(config)
        self.experts = nn.ModuleList(LLaDA2MoeMLP(config, width) for _ in range(config.num_experts))
        self.shared_experts = LLaDA2MoeMLP(config, width * config.num_shared_experts)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        tokens = hidden_states.flatten(0, -2)
        chosen = weighed_answers(self.experts, tokens, *self.gate(tokens)).view(hidden_states.shape)
        return chosen + self.shared_experts(hidden_states)


class LLaDA2MoeAttention(nn.Module):
    """Grouped queries from one projection."""

    is_causal = False

    def __init__(self, config: LLaDA2MoeConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        self.heads = (config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads)
        self.num_key_value_groups = self.heads[0] // self.heads[1]
        self.scaling = self.head_dim**-0.5
        projected = (self.heads[0] + 2 * self.heads[1]) * self.head_dim
        self.query_key_value = nn.Linear(config.hidden_size, projected, bias=False)
        self.query_layernorm = Qwen3RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.key_layernorm = Qwen3RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.dense = nn.Linear(self.heads[0] * self.head_dim, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        projected = self.query_key_value(hidden_states).unflatten(-1, (-1, self.head_dim))
        query, key, value = projected.split((self.heads[0], self.heads[1], self.heads[1]), dim=2)
        query, key = self.query_layernorm(query).transpose(1, 2), self.key_layernorm(key).transpose(1, 2)
        value = value.transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, _ = attend(self, query, key, value, attention_mask, scaling=self.scaling, **kwargs)
        return self.dense(output.flatten(2))


class LLaDA2MoeDecoderLayer(GradientCheckpointingLayer):
    """Attention, and a feed-forward layer or experts, each added to what came in."""

    def __init__(self, config: LLaDA2MoeConfig, layer_idx: int):
        super().__init__()
        self.attention = LLaDA2MoeAttention(config, layer_idx)
        is_dense = layer_idx < config.first_k_dense_replace
        self.mlp = LLaDA2MoeMLP(config, config.intermediate_size) if is_dense else LLaDA2MoeSparseMoeBlock(config)
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        hidden_states = hidden_states + self.attention(self.input_layernorm(hidden_states), **kwargs)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class LLaDA2MoePreTrainedModel(PreTrainedModel):
    """What transformers needs to know of the family."""

    config: LLaDA2MoeConfig
    config_class = LLaDA2MoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LLaDA2MoeDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = ["expert_bias"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": LLaDA2MoeDecoderLayer}

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LLaDA2MoeGate):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            init.zeros_(module.expert_bias)


class LLaDA2MoeModel(LLaDA2MoePreTrainedModel):
    """Embedding, layers and final norm."""

    _input_embed_layer = "word_embeddings"

    def __init__(self, config: LLaDA2MoeConfig):
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LLaDA2MoeDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Glm4MoeRotaryEmbedding(config)
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """
        Args:
            input_ids: `(B, L)` token ids. Exactly one of `input_ids` and `inputs_embeds` `(B, L, H)`.
            attention_mask: `(B, 1, L, S)`, who sees whom; by default all see all.
            position_ids: `(B, L)`; by default from zero.
            use_cache: means nothing here; `past_key_values` among the rest does.

        Returns:
            `last_hidden_state` `(B, L, H)`, after the final norm.
        """
        hidden_states = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            position_ids = torch.arange(hidden_states.shape[1], device=hidden_states.device).unsqueeze(0)
        turns = self.rotary_emb(hidden_states, position_ids)
        for layer in self.layers:
            hidden_states = layer(hidden_states, position_embeddings=turns, attention_mask=attention_mask, **kwargs)
        return BaseModelOutput(last_hidden_state=self.norm(hidden_states))


class LLaDA2MoeModelLM(BlockDiffusionMixin, HeadBesideMixin, LLaDA2MoePreTrainedModel, GenerationMixin):
    """LLaDA2.0 and 2.1 (arXiv 2512.15745, 2602.08676)."""

    post_init: Callable[[], None]

    def __init__(self, config: LLaDA2MoeConfig):
        super().__init__(config)
        self.model = LLaDA2MoeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
