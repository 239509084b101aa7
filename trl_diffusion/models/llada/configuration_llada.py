"""Configuration of LLaDA (arXiv 2502.09992), with the field names of the published checkpoints."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

# The published configuration is a general one (it descends from OLMo) and most of its switches were never used by a
# LLaDA. A checkpoint that sets one of them otherwise is another architecture, and must not be loaded as if it were not.
_ONLY_IMPLEMENTED: dict[str, Any] = {
    "block_type": "llama",
    "block_group_size": 1,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "rope": True,
    "rope_full_precision": True,
    "alibi": False,
    "attention_layer_norm": False,
    "multi_query_attention": None,
    "scale_logits": False,
    "input_emb_norm": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "bias_for_layer_norm": False,
    "rope_scaling": None,
    "attention_dropout": 0.0,
    "residual_dropout": 0.0,
    "embedding_dropout": 0.0,
}


@strict
class LLaDAConfig(PreTrainedConfig):
    r"""
    Configuration of a [`LLaDAModelLM`]. The defaults are those of LLaDA-8B, whose `mlp_hidden_size` is 12288, though.

    Args:
        d_model (`int`, *optional*, defaults to `4096`): Width of the residual stream.
        n_heads (`int`, *optional*, defaults to `32`): Attention heads.
        n_kv_heads (`int`, *optional*): Key/value heads (grouped-query attention). Defaults to `n_heads`.
        n_layers (`int`, *optional*, defaults to `32`): Transformer blocks.
        mlp_hidden_size (`int`, *optional*): Width of the feed-forward layer. Defaults to `mlp_ratio * d_model`.
        mlp_ratio (`int`, *optional*, defaults to `4`): Used when `mlp_hidden_size` is not set.
        activation_type (`str`, *optional*, defaults to `"silu"`): Activation of the feed-forward gate.
        vocab_size (`int`, *optional*, defaults to `126464`): Size of the vocabulary.
        embedding_size (`int`, *optional*): Rows of the embedding and of the output head, if more than `vocab_size`.
        weight_tying (`bool`, *optional*, defaults to `False`): Whether the output head is the embedding.
        max_sequence_length (`int`, *optional*, defaults to `4096`): Longest sequence seen in training.
        rope_theta (`float`, *optional*, defaults to `500000.0`): Base of the rotary frequencies.
        rms_norm_eps (`float`, *optional*, defaults to `1e-5`): Epsilon of the RMS norms.
        init_std (`float`, *optional*, defaults to `0.02`): Standard deviation of the initial weights.
        mask_token_id (`int`, *optional*, defaults to `126336`): Token that stands for a masked position.
        pad_token_id (`int`, *optional*, defaults to `126081`): Padding token.
        eos_token_id (`int`, *optional*, defaults to `126081`): End of text.

    Raises:
        ValueError: a switch of the published configuration asks for an architecture that is not implemented, or the
            configuration is that of LLaDA-MoE, which has the same `model_type`. (`AutoConfig` finds its class.)
    """

    model_type = "llada"
    with_experts: ClassVar[type[PreTrainedConfig]]  # that of LLaDA-MoE, which stands in the room beside
    attribute_map = {
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "num_hidden_layers": "n_layers",
        "intermediate_size": "mlp_hidden_size",
        "hidden_act": "activation_type",
        "max_position_embeddings": "max_sequence_length",
        "tie_word_embeddings": "weight_tying",
        "initializer_range": "init_std",
    }

    d_model: int = 4096
    n_heads: int = 32
    n_kv_heads: int | None = None
    n_layers: int = 32
    mlp_hidden_size: int | None = None
    mlp_ratio: int = 4
    activation_type: str = "silu"
    vocab_size: int = 126464
    embedding_size: int | None = None
    weight_tying: bool = False
    max_sequence_length: int = 4096
    rope_theta: float = 500000.0
    rope_parameters: dict | None = None
    rms_norm_eps: float = 1e-5
    init_std: float = 0.02
    mask_token_id: int | None = 126336
    pad_token_id: int | None = 126081
    eos_token_id: int | list[int] | None = 126081
    bos_token_id: int | None = None
    is_causal: bool = False
    use_cache: bool = False

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """From the entries of a config.json, those of LLaDA-MoE too, which have a class of their own."""
        if _has_experts(config_dict) and "d_model" not in config_dict:
            return cls.with_experts.from_dict(config_dict, **kwargs)
        return super().from_dict(config_dict, **kwargs)

    def __post_init__(self, **kwargs: Any) -> None:
        _refuse_other_architectures({"architectures": self.architectures, **kwargs})
        for alias, name in self.attribute_map.items():
            if alias in kwargs:
                setattr(self, name, kwargs.pop(alias))
        if self.n_kv_heads is None:
            self.n_kv_heads = self.n_heads
        if self.mlp_hidden_size is None:
            self.mlp_hidden_size = self.mlp_ratio * self.d_model
        if self.embedding_size is None:
            self.embedding_size = self.vocab_size
        if self.rope_parameters is None:
            self.rope_parameters = self._plain_rope
        self.validate_architecture()
        super().__post_init__(**kwargs)

    @property
    def _plain_rope(self) -> dict[str, Any]:
        return {"rope_type": "default", "rope_theta": self.rope_theta}

    def validate_architecture(self) -> None:
        """Refuse sizes that do not fit together, and anything that is not a bidirectional model."""
        some_heads = min(self.n_heads, self.n_kv_heads) >= 1
        if not some_heads or self.n_heads % self.n_kv_heads or self.d_model % (2 * self.n_heads):
            raise ValueError(
                f"`d_model` ({self.d_model}) must be an even multiple of `n_heads` ({self.n_heads}), and `n_heads` a "
                f"multiple of `n_kv_heads` ({self.n_kv_heads})."
            )
        if self.embedding_size < self.vocab_size:
            raise ValueError(
                f"`embedding_size` ({self.embedding_size}) must be at least `vocab_size` ({self.vocab_size})."
            )
        if self.activation_type not in ACT2FN:
            raise ValueError(f"`activation_type` must be one of {sorted(ACT2FN)}, got {self.activation_type!r}.")
        if self.rope_parameters != self._plain_rope:
            raise ValueError(
                f"`rope_parameters={self.rope_parameters}` is not implemented: LLaDA's rotary embedding is the plain "
                f"one of base `rope_theta`, {self._plain_rope}."
            )
        if self.is_causal or self.use_cache:
            raise ValueError(
                "LLaDA attends in both directions: `is_causal` and `use_cache` must be `False`, got "
                f"is_causal={self.is_causal}, use_cache={self.use_cache}."
            )


def _has_experts(entries: dict[str, Any]) -> bool:
    """Whether they are of LLaDA-MoE; `LLaDAMoEModelLM` is its published class."""
    return bool(entries.get("num_experts")) or any("MoE" in name for name in entries.get("architectures") or ())


def _refuse_other_architectures(kwargs: dict[str, Any]) -> None:
    architectures = kwargs.get("architectures") or []
    if _has_experts(kwargs):
        raise ValueError(
            f"This is the configuration of LLaDA-MoE (architectures={architectures}, "
            f"num_experts={kwargs.get('num_experts')}), which shares `model_type='llada'` with LLaDA but is another "
            "architecture. `AutoConfig.from_pretrained` finds its class, if its width is called `hidden_size` and not "
            "`d_model`, as published."
        )
    if architectures and not {"LLaDAModelLM", "LLaDAModel"} & set(architectures):
        raise ValueError(
            f"architectures={architectures} with `model_type='llada'` is neither LLaDA (`LLaDAModelLM`) nor LLaDA-MoE "
            "(`LLaDAMoEModelLM`), and what it computes is not known. If it is LLaDA under another name, correct "
            "`architectures` in its config.json."
        )
    for name, implemented in _ONLY_IMPLEMENTED.items():
        value = kwargs.get(name, implemented)
        if value != implemented and not (implemented is None and value is False):
            raise ValueError(
                f"`{name}={value!r}` is not implemented: published LLaDA checkpoints have `{name}={implemented!r}`."
            )
