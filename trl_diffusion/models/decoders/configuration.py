"""
Configurations of bidirectional decoders: those of transformers, under the published `model_type`.

Published configurations have switches that the classes of transformers do not know, and would pass over in silence.
"""

from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

if TYPE_CHECKING:  # what the mixin is put in front of
    _Config: TypeAlias = PreTrainedConfig
else:
    _Config = object

# Switches of related architectures, and the value with which they change nothing
_OFF: dict[str, Any] = {
    "alibi": False,
    "clip_qkv": None,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "layer_norm_eps": None,  # iLLaDA: LayerNorm instead of RMSNorm
    "logit_scale": None,
    "num_experts": None,
    "partial_rotary_factor": 1.0,
    "resid_pdrop": 0.0,  # iLLaDA: dropout of what a layer adds
    "use_mrope": False,  # Dream: rotary positions of images
    "use_sliding_window": False,
}


class BidirectionalConfig(_Config):
    """Put in front of a configuration of transformers: both sides are seen, and what is not implemented is refused."""

    model_type: ClassVar[str]
    off: ClassVar[dict[str, Any]] = _OFF

    def __post_init__(self, **kwargs: Any) -> None:
        asked = {name: kwargs.get(name, getattr(self, name, off)) for name, off in self.off.items()}
        for name, value in asked.items():
            if value is not None and value != self.off[name]:
                raise ValueError(
                    f"`{name}={value!r}` is not implemented for model_type={self.model_type!r}, whose published "
                    f"checkpoints have `{name}={self.off[name]!r}`. It would be another model: look for a class of its "
                    "own."
                )
        # A choice of kernels, with which a checkpoint was trained, is none of the architecture
        kwargs.pop("attn_implementation", None)
        self.use_cache = False  # some publish `True`, which means nothing for a model that sees both sides
        super().__post_init__(**kwargs)
        if hasattr(self, "output_router_logits"):  # whatever its value, TRL would ask for the loss of the router
            del self.output_router_logits
        if self.is_causal:
            raise ValueError(
                f"`is_causal=True` contradicts model_type={self.model_type!r}, a model that attends in both "
                "directions. If the checkpoint is an autoregressive one, it has no ELBO; else remove the entry."
            )


@strict
class ILLaDAConfig(BidirectionalConfig, LlamaConfig):
    """
    iLLaDA (arXiv 2606.25331): Llama with grouped queries. The defaults are those of iLLaDA-8B where they are published.

    The mask token stands neither in the published configuration nor in the tokenizer.
    """

    model_type = "illada"
    vocab_size: int = 155136
    intermediate_size: int = 14336
    num_key_value_heads: int | None = 8
    max_position_embeddings: int = 8192
    tie_word_embeddings: bool = True
    is_causal: bool = False
    mask_token_id: int | None = 5
    bos_token_id: int | None = 0
    pad_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        rope = self.rope_parameters or {}
        if rope.get("rope_type", "default") != "default" and rope.get("factor", 1.0) != 1:
            raise ValueError(f"`rope_scaling={rope}` is not implemented: iLLaDA's rotary embedding is the plain one.")


@strict
class DreamConfig(BidirectionalConfig, Qwen2Config):
    """Dream 7B (arXiv 2508.15487), Dream-Coder and DiffuCoder (arXiv 2506.20639): Qwen2, whose logits are shifted."""

    model_type = "Dream"
    vocab_size: int = 152064
    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int | None = 4
    is_causal: bool = False
    mask_token_id: int | None = 151666
    bos_token_id: int | None = 151643
    pad_token_id: int | None = 151643
    eos_token_id: int | list[int] | None = 151643

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """From the entries of a config.json, those of DreamReasoner too, which has the same `model_type`."""
        if cls is DreamConfig and "block_size" in config_dict:
            return DreamReasonerConfig.from_dict(config_dict, **kwargs)
        return super().from_dict(config_dict, **kwargs)

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if hasattr(self, "block_size"):
            raise ValueError(
                f"`block_size={self.block_size}` is an entry of DreamReasoner, which has the same `model_type` as "
                "Dream. Load it with `AutoConfig.from_pretrained`, which finds its class."
            )


@strict
class DreamReasonerConfig(BidirectionalConfig, Qwen3Config):
    """DreamReasoner 8B (arXiv 2606.19257): Qwen3, converted to block diffusion, with the `model_type` of Dream."""

    model_type = "Dream"
    vocab_size: int = 151936
    intermediate_size: int = 12288
    num_hidden_layers: int = 36
    num_key_value_heads: int | None = 8
    is_causal: bool = False
    block_size: int = 32
    mask_token_id: int | None = 151669
    pad_token_id: int | None = 151643
    eos_token_id: int | list[int] | None = 151643


@strict
class FastDLLMQwenConfig(BidirectionalConfig, Qwen2Config):
    """Fast-dLLM v2 (arXiv 2509.26328): Qwen2.5, converted to block diffusion, whose logits are shifted."""

    model_type = "Fast_dLLM_Qwen"
    vocab_size: int = 152064
    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int | None = 4
    is_causal: bool = False
    bd_size: int = 32
    mask_token_id: int | None = 151665
    bos_token_id: int | None = 151643
    pad_token_id: int | None = 151643
    eos_token_id: int | list[int] | None = 151645


@strict
class SDARConfig(BidirectionalConfig, Qwen3Config):
    """
    SDAR (arXiv 2510.06303): Qwen3, converted to block diffusion. The defaults are those of SDAR-1.7B; its published
    configuration may lack the size of a block and the mask token.
    """

    model_type = "sdar"
    vocab_size: int = 151936
    hidden_size: int = 2048
    intermediate_size: int = 6144
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 8
    max_position_embeddings: int = 32768
    is_causal: bool = False
    block_size: int = 4
    mask_token_id: int | None = 151669
    bos_token_id: int | None = 151643
    pad_token_id: int | None = 151643
    eos_token_id: int | list[int] | None = 151643


@strict
class A2DQwen2Config(BidirectionalConfig, Qwen2Config):
    """Qwen2, converted to a masked diffusion model. Its tokenizer names the mask token."""

    model_type = "a2d-qwen2"
    is_causal: bool = False
    mask_token_id: int | None = None


@strict
class A2DQwen3Config(BidirectionalConfig, Qwen3Config):
    """Qwen3, converted to a masked diffusion model. Its tokenizer names the mask token."""

    model_type = "a2d-qwen3"
    is_causal: bool = False
    mask_token_id: int | None = None


@strict
class A2DLlamaConfig(BidirectionalConfig, LlamaConfig):
    """Llama, converted to a masked diffusion model. Its tokenizer names the mask token."""

    model_type = "a2d-llama"
    is_causal: bool = False
    mask_token_id: int | None = None


@strict
class LLaDAMoEConfig(BidirectionalConfig, Qwen3Config):
    """
    LLaDA-MoE (arXiv 2509.24389), whose `model_type` is that of dense LLaDA. The defaults are those of the 7B-A1B.

    The layers of Qwen3, with experts in the place of the feed-forward layer. The loss that balances their use in
    pre-training (`router_aux_loss_coef`) is not computed: what a score asks for has no room for it.
    """

    model_type = "llada"
    attribute_map = {"intermediate_size": "expert_intermediate_size"}
    default_theta = 50000.0
    off: ClassVar[dict[str, Any]] = {
        **{name: value for name, value in _OFF.items() if name != "num_experts"},
        "moe_router_enable_expert_bias": False,
        "moe_router_score_function": "softmax",
        "norm_topk_prob": False,
        "output_router_logits": False,
        "qk_layernorm": True,
        "routed_scaling_factor": 1.0,
        "router_num_group": None,
        "router_topk_group": None,
        "shared_expert_intermediate_size": None,
    }
    vocab_size: int = 157184
    hidden_size: int = 2048
    expert_intermediate_size: int = 1024
    num_hidden_layers: int = 16
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 16
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-5
    num_experts: int = 64
    num_experts_per_tok: int = 8
    norm_topk_prob: bool | None = None  # read by the router of transformers
    is_causal: bool = False
    mask_token_id: int | None = 156895
    pad_token_id: int | None = 156892
    eos_token_id: int | list[int] | None = 156892

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        frequency = getattr(self, "moe_layer_freq", None)
        if frequency not in (None, 1, [1] * self.num_hidden_layers):
            raise ValueError(
                f"`moe_layer_freq={frequency}` is not implemented for LLaDA-MoE: in published checkpoints every layer "
                "has experts. It would be another model: look for a class of its own."
            )
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"`num_experts_per_tok` ({self.num_experts_per_tok}) must be at least 1 and at most `num_experts` "
                f"({self.num_experts})."
            )
