"""What `memory.py` adds up: bytes of a model's weights, and of what the backward of one of its blocks needs."""

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from ..scoring.gradients import trainable_parameters
from ..scoring.output_head import VOCABULARY_TILE

_LOGITS_BLOCK = 4096  # rows of logits that TRL's kernel computes together
_NF4_BLOCK, _NF4_BLOCKS_PER_SCALE = 64, 256  # bitsandbytes: weights per scale, scales per scale of scales
_SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")


@dataclass(frozen=True)
class Weights:
    """
    Args:
        blocks, others, adapters: bytes of the linear layers of the blocks, of the rest, of the adapters.
        num_blocks: weights in the linear layers.
        trained, num_trained: bytes and number of the trained weights.
        largest_quantized: weights of the largest quantised layer, which is unpacked when it is used.
        is_adapted: whether only an adapter is trained.
    """

    blocks: int = 0
    others: int = 0
    adapters: int = 0
    num_blocks: int = 0
    trained: int = 0
    num_trained: int = 0
    largest_quantized: int = 0
    is_adapted: bool = False

    @staticmethod
    def of(model: Any, quantization_config: Any) -> "Weights":
        is_adapted = isinstance(model, PeftModel)
        prefix = model.base_model.prefix if is_adapted else None
        head = _base(model).get_output_embeddings()
        linears = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head}
        found = {"blocks": 0, "others": 0, "adapters": 0, "num_blocks": 0, "largest_quantized": 0}
        for name, weight in model.named_parameters():
            if prefix and prefix in name:
                found["adapters"] += weight.nbytes
            elif id(weight) not in linears:
                found["others"] += weight.nbytes
            else:
                size, number, is_quantized = _linear(weight, quantization_config)
                found["blocks"] += size
                found["num_blocks"] += number
                found["largest_quantized"] = max(found["largest_quantized"], number * is_quantized)
        trained = trainable_parameters(model)
        return Weights(
            **found,
            trained=sum(p.nbytes for p in trained),
            num_trained=sum(p.numel() for p in trained),
            is_adapted=is_adapted,
        )


def _base(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _linear(weight: torch.nn.Parameter, quantization_config: Any) -> tuple[int, int, bool]:
    """Bytes and number of the weights of a linear layer, and whether it is quantised to 4 bits."""
    state = getattr(weight, "quant_state", None)
    if state is not None:  # bitsandbytes, loaded
        tensors = [t for s in (state, state.state2) if s for t in vars(s).values() if isinstance(t, torch.Tensor)]
        return weight.nbytes + sum(t.nbytes for t in tensors), state.shape.numel(), True
    number = weight.numel()
    if not getattr(quantization_config, "load_in_4bit", False):
        return weight.nbytes, number, False
    scales = -(-number // _NF4_BLOCK)
    size = number // 2 + 16 * 4
    if quantization_config.bnb_4bit_use_double_quant:
        return size + scales + 4 * -(-scales // _NF4_BLOCKS_PER_SCALE) + 4 + 256 * 4, number, True
    return size + 4 * scales, number, True


@dataclass(frozen=True)
class Block:
    """
    One block: sizes, and bytes per token.

    Args:
        number: of blocks.
        width, kv_width, inner: of the residual stream, of keys, and of the feed-forward layer.
        heads: of attention.
        weight_bytes: of a number in the residual stream, which has the precision of the weights.
        compute_bytes: of a number that a matrix product makes.
        is_eager: whether attention scores are kept.
        adapted_inputs, ranks: summed over the adapted layers of the block.
        adapter_bytes: of a number that an adapter makes.
        copies: whether each adapted layer keeps a copy of its own of its input.
        mask_bytes: of dropout, per number.
    """

    number: int
    width: int
    kv_width: int
    inner: int
    heads: int
    weight_bytes: int
    compute_bytes: int
    is_eager: bool
    adapted_inputs: int
    ranks: int
    adapter_bytes: int
    copies: bool
    mask_bytes: int

    @staticmethod
    def of(model: Any, weights: Weights, bf16: bool, device: str) -> "Block":
        config = _base(model).config
        missing = [name for name in _SIZES if not isinstance(getattr(config, name, None), int)]
        if missing:
            raise ValueError(f"Memory is estimated for models of Llama blocks; this `config` has no {missing}.")
        heads = config.num_attention_heads
        weight_bytes = _base(model).get_input_embeddings().weight.element_size()
        compute_bytes = 2 if bf16 else weight_bytes
        adapted = [m for m in model.modules() if isinstance(m, LoraLayer)]
        dropout = any(d.p for m in adapted for d in m.lora_dropout.values() if isinstance(d, torch.nn.Dropout))
        stored = weights.trained // max(weights.num_trained, 1)
        # Under autocast on a GPU, PEFT's 4-bit layers leave their input as it is
        converts = stored != weight_bytes and not (bf16 and weights.largest_quantized and device != "cpu")
        return Block(
            number=config.num_hidden_layers,
            width=config.hidden_size,
            kv_width=config.hidden_size // heads * (getattr(config, "num_key_value_heads", None) or heads),
            inner=config.intermediate_size,
            heads=heads,
            weight_bytes=weight_bytes,
            compute_bytes=compute_bytes,
            is_eager=config._attn_implementation == "eager",
            adapted_inputs=sum(m.in_features for m in adapted) // config.num_hidden_layers,
            ranks=sum(rank for m in adapted for rank in m.r.values()) // config.num_hidden_layers,
            adapter_bytes=compute_bytes if bf16 else stored,
            copies=dropout or weight_bytes != compute_bytes or converts,
            mask_bytes=dropout * (stored if device == "cpu" else 1),
        )

    def kept(self, weights: Weights) -> int:
        """What the backward of a block needs besides attention."""
        norms, feed_forward = 2 * 4 * self.width, 3 * self.compute_bytes * self.inner
        if not weights.is_adapted:
            norms += 2 * self.weight_bytes * self.width  # for the gradient of their weights
            inputs = (5 if self.copies else 2) * self.width + self.inner
            return norms + feed_forward + self.compute_bytes * inputs
        inputs = min(self.adapted_inputs, 2 * self.width + self.inner) * self.compute_bytes
        if self.copies:
            inputs = self.adapted_inputs * (self.adapter_bytes + self.mask_bytes)
        return norms + feed_forward + inputs + self.ranks * self.adapter_bytes

    def kept_by_attention(self, length: int) -> int:
        """Queries, keys, values, the result and its normaliser; the scores too where no kernel avoids them."""
        kept = 2 * self.compute_bytes * (self.width + self.kv_width) + 4 * self.heads
        return kept + self.is_eager * self.heads * length * (4 + self.compute_bytes % 4)

    def casts(self, weights: Weights, kept_blocks: int) -> int:
        """Weights in the precision of the computation, where they are not stored in it."""
        size = 0
        if weights.trained != weights.num_trained * self.adapter_bytes:
            size += weights.num_trained * self.adapter_bytes
        if weights.is_adapted and self.weight_bytes != self.compute_bytes and not weights.largest_quantized:
            size += weights.num_blocks * self.compute_bytes * kept_blocks // self.number
        return size

    @property
    def in_backward(self) -> int:
        """Two gradients of the feed-forward layer in float32, about what is alive at once."""
        return 2 * 4 * self.inner


def head_bytes(model: Any, hidden: int, block: Block, device: str) -> int:
    """TRL's kernel for `hidden` tokens: a tile of logits, and gradients in float32."""
    weight = _base(model).get_output_embeddings().weight
    columns, width = min(VOCABULARY_TILE, weight.shape[0]), block.width
    copies = 7.25 * 4 if device == "cpu" else 0
    size = int(min(hidden, _LOGITS_BLOCK) * columns * (block.compute_bytes + copies))
    size += hidden * width * (block.compute_bytes + 4)
    if block.weight_bytes != block.compute_bytes:
        size += columns * width * block.compute_bytes
    if weight.requires_grad:
        size += weight.numel() * (4 + (block.weight_bytes if block.weight_bytes != 4 else 0))
    return size
