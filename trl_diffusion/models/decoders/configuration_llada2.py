"""Configuration of LLaDA2: the published fields, and what of them is not implemented."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import Qwen3Config

from .configuration import BidirectionalConfig


@strict
class LLaDA2MoeConfig(BidirectionalConfig, Qwen3Config):
    """
    LLaDA2.0 and 2.1 (arXiv 2512.15745, 2602.08676). The defaults are those of the mini.

    The first layers are dense, and those after have experts. A token's are chosen in the best groups by a score with a
    bias, and weighed by the score without it; one more is shared by all tokens. The published configuration has neither
    the mask token nor the size of a block.
    """

    model_type = "llada2_moe"
    default_theta = 600000.0
    off: ClassVar[dict[str, Any]] = {
        "alibi": False,
        "attention_dropout": 0.0,
        "embedding_dropout": 0.0,
        "hidden_act": "silu",
        "moe_router_enable_expert_bias": True,
        "norm_head": False,
        "norm_softmax": False,
        "norm_topk_prob": True,
        "num_nextn_predict_layers": 0,
        "output_dropout": 0.0,
        "output_router_logits": False,
        "router_dtype": "fp32",
        "score_function": "sigmoid",
        "tie_word_embeddings": False,
        "use_bias": False,
        "use_qk_norm": True,
        "use_qkv_bias": False,
        "use_rmsnorm": True,
        "use_sliding_window": False,
        "using_split_qkv_in_self_attention": False,
    }
    vocab_size: int = 157184
    hidden_size: int = 2048
    intermediate_size: int = 5120
    moe_intermediate_size: int = 512
    num_hidden_layers: int = 20
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 4
    head_dim: int = 128
    max_position_embeddings: int = 32768
    partial_rotary_factor: float = 0.5
    first_k_dense_replace: int = 1
    num_experts: int = 256
    num_experts_per_tok: int = 8
    num_shared_experts: int = 1
    n_group: int = 8
    topk_group: int = 4
    routed_scaling_factor: float = 2.5
    is_causal: bool = False
    block_size: int = 32
    mask_token_id: int | None = 156895
    pad_token_id: int | None = 156892
    eos_token_id: int | list[int] | None = 156892

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        config: Any = self
        rope = config.rope_parameters or {}
        if rope.get("rope_type", "default") != "default":
            raise ValueError(f"`rope_scaling={rope}` is not implemented: LLaDA2's rotary embedding is the plain one.")
        config.rope_parameters = {**rope, "partial_rotary_factor": self.partial_rotary_factor}
        turned = self.head_dim * self.partial_rotary_factor
        if getattr(self, "rotary_dim", turned) != turned:
            raise ValueError(
                f"`rotary_dim` ({self.rotary_dim}) must be `head_dim` ({self.head_dim}) times `partial_rotary_factor` "
                f"({self.partial_rotary_factor})."
            )
        of_a_group = self.num_experts // self.n_group
        if of_a_group < 2 or self.num_experts % self.n_group or not 1 <= self.topk_group <= self.n_group:
            raise ValueError(
                f"`n_group` ({self.n_group}) must divide `num_experts` ({self.num_experts}) into groups of two at "
                f"least, and `topk_group` ({self.topk_group}) be at most as large."
            )
        if not 1 <= self.num_experts_per_tok <= of_a_group * self.topk_group:
            raise ValueError(
                f"`num_experts_per_tok` ({self.num_experts_per_tok}) must be at least 1 and at most the number of "
                f"experts in `topk_group` ({self.topk_group}) groups, {of_a_group * self.topk_group}."
            )
