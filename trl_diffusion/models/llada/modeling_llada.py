"""
LLaDA (arXiv 2502.09992): a Llama block without the causal mask.

The module tree is that of the published checkpoints, so they load and save without renaming and adapters can be
exchanged with any other implementation. Note that `ff_out` names two things in that tree: the down projection of each
block, and the output head `model.transformer.ff_out`.

The model knows nothing of masking or of likelihoods: it maps a sequence with some tokens masked to one distribution
per position.
"""

from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.loss.loss_utils import fixed_cross_entropy
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaRMSNorm,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from ..sampler import DiffusionGenerationMixin
from ..whole import WholeCheckpointMixin
from .configuration_llada import LLaDAConfig


class Rotation:
    """
    Cosines and sines of the angles that queries and keys are turned by, `(B, L, head_dim)` each, in float32.

    Neither a tensor nor a container that others open: FSDP's mixed precision casts every tensor that it finds in a
    block's arguments, and angles in bfloat16 are far off at late positions.
    """

    def __init__(self, cos: torch.Tensor, sin: torch.Tensor):
        self.cos, self.sin = cos, sin

    def to(self, device: torch.device, non_blocking: bool = False) -> "Rotation":
        """On another device: how accelerate hands arguments from block to block of a model on several devices."""
        return Rotation(*(part.to(device, non_blocking=non_blocking) for part in (self.cos, self.sin)))

    def turn(self, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys `(B, heads, L, head_dim)`, turned in float32 and rounded once (`rope_full_precision`)."""
        turned = apply_rotary_pos_emb(query.float(), key.float(), self.cos, self.sin)
        return turned[0].to(query.dtype), turned[1].to(key.dtype)


def rotation(config: LLaDAConfig, position_ids: torch.Tensor) -> Rotation:
    """
    The [`Rotation`] at `position_ids` `(B, L)`.

    Frequencies are computed here and kept nowhere: as a buffer they would be rounded by `model.to(bfloat16)`, for good.
    """
    size = config.d_model // config.n_heads
    steps = torch.arange(0, size, 2, device=position_ids.device, dtype=torch.float32)
    angles = position_ids[..., None].float() * (1.0 / config.rope_theta ** (steps / size))
    angles = torch.cat([angles, angles], dim=-1)
    return Rotation(angles.cos(), angles.sin())


class LLaDALlamaBlock(GradientCheckpointingLayer):
    """Pre-norm attention and SwiGLU. Carries the published class name, which FSDP configurations refer to."""

    def __init__(self, config: LLaDAConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.d_model // config.n_heads
        self.num_key_value_groups = config.n_heads // config.n_kv_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False  # read by the attention backends
        kv_dim = config.n_kv_heads * self.head_dim
        self.attn_norm = LlamaRMSNorm(config.d_model, eps=config.rms_norm_eps)
        self.q_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        self.k_proj = nn.Linear(config.d_model, kv_dim, bias=False)
        self.v_proj = nn.Linear(config.d_model, kv_dim, bias=False)
        self.attn_out = nn.Linear(config.d_model, config.d_model, bias=False)
        self.ff_norm = LlamaRMSNorm(config.d_model, eps=config.rms_norm_eps)
        self.ff_proj = nn.Linear(config.d_model, config.mlp_hidden_size, bias=False)
        self.up_proj = nn.Linear(config.d_model, config.mlp_hidden_size, bias=False)
        self.ff_out = nn.Linear(config.mlp_hidden_size, config.d_model, bias=False)
        self.act = ACT2FN[config.activation_type]

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        rotation: Rotation,
        **kwargs: Any,
    ) -> torch.Tensor:
        hidden_states = hidden_states + self._attention(hidden_states, attention_mask, rotation, **kwargs)
        normed = self.ff_norm(hidden_states)
        return hidden_states + self.ff_out(self.act(self.ff_proj(normed)) * self.up_proj(normed))

    def _attention(self, hidden_states, attention_mask, rotation, past_key_values=None, **kwargs):
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        normed = self.attn_norm(hidden_states)
        query, key, value = (
            projection(normed).view(heads).transpose(1, 2) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = rotation.turn(query, key)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, _ = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.scaling,
            dropout=0.0,
            **kwargs,
        )
        return self.attn_out(output.reshape(hidden_states.shape))


class LLaDAPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of the family."""

    config: LLaDAConfig
    config_class = LLaDAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LLaDALlamaBlock"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": LLaDALlamaBlock}


class LLaDAModel(LLaDAPreTrainedModel):
    """Embedding, blocks and final norm. Holds the output head too, where the published checkpoints keep it."""

    _tied_weights_keys = {"transformer.ff_out.weight": "transformer.wte.weight"}

    def __init__(self, config: LLaDAConfig):
        super().__init__(config)
        if not isinstance(config, LLaDAConfig):
            raise ValueError(
                f"`{type(config).__name__}` is the configuration of LLaDA-MoE and not of this dense LLaDA. Load the "
                "checkpoint with `AutoModelForCausalLM.from_pretrained`."
            )
        config.validate_architecture()  # it may have been changed since it was read
        # No padding index: LLaDA pads with its end-of-text token, whose embedding must keep learning.
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.embedding_size, config.d_model),
                "blocks": nn.ModuleList(LLaDALlamaBlock(config, i) for i in range(config.n_layers)),
                "ln_f": LlamaRMSNorm(config.d_model, eps=config.rms_norm_eps),
                "ff_out": nn.Linear(config.d_model, config.embedding_size, bias=False),
            }
        )
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer["wte"]

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.transformer["wte"] = value

    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """
        Args:
            input_ids: `(B, L)` token ids. Exactly one of `input_ids` and `inputs_embeds` `(B, L, d_model)`.
            attention_mask: `(B, L)`, one at real tokens, or a mask of shape `(B, 1, L, L)`.
            position_ids: `(B, L)`. By default real tokens count from zero, so that left padding changes nothing.
            past_key_values: keys and values of other tokens. `attention_mask` has to be of four dimensions, and say of
                them too, and `position_ids` be given.

        Returns:
            `last_hidden_state` `(B, L, d_model)`, after the final norm and before the output head.

        Raises:
            ValueError: `position_ids` start over inside a row (packing) and the attention would mix the sequences.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Exactly one of `input_ids` and `inputs_embeds` must be given.")
        kwargs.pop("use_cache", None)
        hidden_states = self.transformer["wte"](input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            position_ids = _positions(hidden_states, attention_mask)
        else:
            self._refuse_leaking_packing(position_ids, attention_mask, hidden_states.shape[0])
            kwargs["position_ids"] = position_ids  # flash attention reads packed boundaries from them
        mask = self._attention_bias(hidden_states, attention_mask)
        turns = rotation(self.config, position_ids)
        for block in self.transformer["blocks"]:
            hidden_states = block(
                hidden_states, attention_mask=mask, rotation=turns, past_key_values=past_key_values, **kwargs
            )
        return BaseModelOutput(last_hidden_state=self.transformer["ln_f"](hidden_states))

    def _attention_bias(self, hidden_states, attention_mask):
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask)
        if self.config._attn_implementation == "eager" and mask is not None and mask.dtype == torch.bool:
            # A 4D mask is passed on as it came, and eager attention adds it to the scores
            mask = torch.where(mask, 0.0, torch.finfo(hidden_states.dtype).min).to(hidden_states.dtype)
        return mask

    def _refuse_leaking_packing(self, position_ids, attention_mask, num_rows):
        if attention_mask is not None and attention_mask.dim() != 2:
            return  # it says itself who sees whom
        real = torch.ones_like(position_ids) if attention_mask is None else attention_mask
        neighbours = real[:, 1:].bool() & real[:, :-1].bool()
        packed = bool(((position_ids.diff(dim=-1) < 1) & neighbours).any())
        separated = "flash" in self.config._attn_implementation and num_rows == 1 and bool(real.all())
        if packed and not separated:
            raise ValueError(
                "`position_ids` start over inside a row (packing), and with "
                f"attn_implementation={self.config._attn_implementation!r} the packed sequences would attend to each "
                "other. Pass a block-diagonal 4D `attention_mask`, use a flash attention backend with one row and no "
                "padding, or do not pack."
            )


def _positions(hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    if attention_mask is None or attention_mask.dim() != 2:
        return torch.arange(hidden_states.shape[1], device=hidden_states.device).unsqueeze(0)
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0).to(hidden_states.device)


class LLaDAModelLM(WholeCheckpointMixin, LLaDAPreTrainedModel, DiffusionGenerationMixin, GenerationMixin):
    """LLaDA with its output head: one distribution over the vocabulary per position, for the token *at* it."""

    def __init__(self, config: LLaDAConfig):
        super().__init__(config)
        self.model = LLaDAModel(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.model.transformer["ff_out"]

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.model.transformer["ff_out"] = value

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        self.config.embedding_size = embeddings.weight.shape[0]  # transformers knows of `vocab_size` only
        return embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: int | torch.Tensor | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """
        Args:
            input_ids, attention_mask, position_ids, inputs_embeds: as in [`LLaDAModel.forward`].
            labels: `(B, L)` tokens to predict in place, -100 where there is none. The loss is their mean negative
                log-probability, without the weights of the ELBO.
            logits_to_keep: number of last positions, or positions, whose logits are wanted. All by default.
            num_items_in_batch: what to divide the summed loss by, instead of the number of labels: the Trainer's way to
                average over accumulated batches.

        Returns:
            `logits` `(B, L, V)`.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.get_output_embeddings()(outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = fixed_cross_entropy(
                logits.float().flatten(0, 1), labels[:, keep].flatten(), num_items_in_batch=num_items_in_batch
            )
        return MaskedLMOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)
