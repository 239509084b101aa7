"""
How much memory a training step will need, by part, before anything is loaded.

The parts are counted, not measured: the weights and adapters of the very architecture, built without memory on torch's
meta device, and, of one chunk of draws, the tensors that the backward of a Llama block needs. What the number of draws
does not appear in does not grow with it. Left out: the driver's context and fragmentation (see `RESERVED`), the buckets
of DDP, and savings by sharding.
"""

import copy
from dataclasses import dataclass, fields
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedConfig

from ..scoring.adapters import with_fitting_targets
from ..scoring.gradients import GRADIENT_MODES, choose_gradient_mode
from ..scoring.responses import TOKENS_PER_FORWARD, draws_per_chunk
from .memory_parts import Block, Weights, head_bytes

# What a device holds besides: the driver's context, cuBLAS workspaces, gaps between blocks
RESERVED = 1_000_000_000


@dataclass(frozen=True)
class MemoryEstimate:
    """
    Bytes of a training step by part. `str()` is a table of them.

    Args:
        blocks: weights of the linear layers of the blocks, quantised or not.
        embeddings: embedding, output head and norms, never quantised.
        reference: a second copy of the weights, where the reference is one.
        adapters: trained weights beside the model's own.
        gradients: of the trained weights.
        optimizer: state of the optimiser.
        buffers: gradients that wait: of each response (immediate), or of the micro-batch until it is added.
        activations: what the forward of a chunk keeps for its backward, without attention.
        attention: the same, of attention. None with layer checkpointing.
        casts: copies of weights in the precision of the computation.
        head: logits of masked tokens, and the gradient of their hidden states.
        backward: what the backward of one block needs besides; with layer checkpointing its activations, computed
            again. The head's backward comes before, so the total counts the larger of the two.
    """

    blocks: int
    embeddings: int
    reference: int
    adapters: int
    gradients: int
    optimizer: int
    buffers: int
    activations: int
    attention: int
    casts: int
    head: int
    backward: int

    @property
    def total(self) -> int:
        """All parts, those that follow one another counted once."""
        return sum(getattr(self, field.name) for field in fields(self)) - min(self.head, self.backward)

    def __str__(self) -> str:
        rows = [(field.name, getattr(self, field.name)) for field in fields(self)] + [("total", self.total)]
        return "\n".join(f"{name:<12}{size / 1e9:>8.2f} GB" for name, size in rows)


def estimate_memory(
    config: PreTrainedConfig,
    *,
    max_length: int = 1024,
    response_length: int | None = None,
    num_responses: int = 2,
    num_mc_samples: int = 8,
    draws_per_forward: int | None = None,
    peft_config: Any = None,
    quantization_config: Any = None,
    dtype: str = "bfloat16",
    bf16: bool = True,
    gradient_checkpointing: bool = True,
    gradient_accumulation_steps: int = 1,
    elbo_gradient: str = "auto",
    separate_reference: bool | None = None,
    optimizer_bytes: int = 8,
    device: str = "cuda",
) -> MemoryEstimate:
    """
    Bytes that a training step needs at its peak, for a model made of Llama blocks.

    Args:
        config: of the model; [`LLaDAConfig`], or one with the same names. Or a model, whose weights are counted as they
            are.
        max_length: tokens of prompt and response together, in the longest example.
        response_length: tokens of its response, which are all hidden in the worst draw; by default all.
        num_responses: responses of a micro-batch: two for each pair, one for each row of unpaired feedback.
        num_mc_samples: draws per response. Without effect, unless they all fit in one chunk or `elbo_gradient="graph"`.
        draws_per_forward: as in the trainers' arguments.
        peft_config: the adapter, as for the trainers; without one all weights are trained.
        quantization_config: as for the trainers; 4 bits are understood.
        dtype: of the weights that are not quantised.
        bf16: whether computations run in bfloat16 (autocast), as in the trainers' arguments.
        gradient_checkpointing: as in the trainers' arguments.
        gradient_accumulation_steps: as in the trainers' arguments; it matters whether there are several.
        elbo_gradient: as in the trainers' arguments.
        separate_reference: whether the reference is a copy of the weights; by default, if there is no adapter.
        optimizer_bytes: state per trained weight: 8 for Adam in float32, 2 for Adam in 8 bits.
        device: where it runs. On the CPU, TRL's kernel of the output head makes copies of the logits.

    Returns:
        [`MemoryEstimate`].

    Raises:
        ValueError: the configuration has no sizes of Llama blocks, or a value that is not understood.
    """
    _refuse(max_length, response_length, quantization_config, elbo_gradient)
    model = config if isinstance(config, torch.nn.Module) else without_memory(config, dtype, peft_config)
    weights = Weights.of(model, quantization_config)
    block = Block.of(model, weights, bf16, device)
    mode, _ = choose_gradient_mode(elbo_gradient, model)
    tokens = largest_chunk(max_length, num_mc_samples, draws_per_forward)
    begun = num_mc_samples > draws_per_chunk(max_length, draws_per_forward)  # a sum is there when the last chunk runs
    in_graphs = num_responses * num_mc_samples * max_length if mode == "graph" else tokens
    hidden = min(tokens, -(-tokens // max_length) * (response_length or max_length))
    kept, attention, backward = _per_token(block, weights, max_length, gradient_checkpointing)
    copied = separate_reference or (separate_reference is None and not weights.is_adapted)
    return MemoryEstimate(
        blocks=weights.blocks,
        embeddings=weights.others,
        reference=weights.blocks + weights.others if copied else 0,
        adapters=weights.adapters,
        gradients=weights.trained,
        optimizer=weights.num_trained * optimizer_bytes,
        buffers=_waiting_gradients(mode, weights, num_responses - 1 + begun, gradient_accumulation_steps),
        activations=in_graphs * kept,
        attention=in_graphs * attention,
        casts=block.casts(weights, 1 if gradient_checkpointing else block.number),
        head=head_bytes(model, hidden, block, device),
        backward=tokens * backward + weights.largest_quantized * block.compute_bytes,
    )


def _refuse(max_length: int, response_length: int | None, quantization_config: Any, elbo_gradient: str) -> None:
    if not 1 <= (response_length or max_length) <= max_length:
        raise ValueError(
            f"`response_length` must be at least 1 and at most `max_length`, got response_length={response_length} and "
            f"max_length={max_length}."
        )
    if quantization_config is not None and not getattr(quantization_config, "load_in_4bit", False):
        raise ValueError(
            f"`quantization_config` must be one with `load_in_4bit=True`, got {quantization_config}. To estimate for "
            "another, pass the loaded model instead of its configuration."
        )
    if elbo_gradient not in GRADIENT_MODES:
        raise ValueError(f"`elbo_gradient` must be one of {GRADIENT_MODES}, got {elbo_gradient!r}.")


def _per_token(block: Block, weights: Weights, length: int, gradient_checkpointing: bool) -> tuple[int, int, int]:
    """Bytes that are kept until the backward, those of attention among them apart, and those that it needs besides."""
    kept, attention = block.kept(weights), block.kept_by_attention(length)
    around = (4 + 2 * block.weight_bytes) * block.width  # the last norm, what goes in, what comes out
    if gradient_checkpointing:
        inputs = block.number * block.width * block.weight_bytes
        return inputs + around, 0, kept + attention + block.in_backward
    return block.number * kept + around, block.number * attention, block.in_backward


def _waiting_gradients(mode: str, weights: Weights, num_sums: int, gradient_accumulation_steps: int) -> int:
    if mode == "immediate":
        return num_sums * weights.num_trained * 4  # in float32, one for each response
    return weights.trained if gradient_accumulation_steps > 1 else 0


def without_memory(config: PreTrainedConfig, dtype: str, peft_config: Any) -> torch.nn.Module:
    """The model on the meta device, with its adapter."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
        if peft_config is None:
            return model
        # A copy: PEFT writes the model's name into it
        return get_peft_model(model, with_fitting_targets(model, copy.deepcopy(peft_config)))


def largest_chunk(longest: int, num_mc_samples: int, draws_per_forward: int | None) -> int:
    """Tokens of the largest chunk that responses of up to `longest` tokens make; shorter ones may fill the budget."""
    if draws_per_forward is not None:
        return min(draws_per_forward, num_mc_samples) * longest
    return max(longest, min(TOKENS_PER_FORWARD, num_mc_samples * longest))


def shortage(estimate: MemoryEstimate, available: int, remedies: list[str]) -> str | None:
    """
    What to say of a run that is not expected to fit; nothing of one that is.

    Args:
        estimate: of the run.
        available: bytes of the device.
        remedies: options that would lower the estimate.
    """
    if estimate.total + RESERVED <= available:
        return None
    options = ", ".join(f"`{option}`" for option in remedies)
    return (
        f"Training is estimated to need {estimate.total / 1e9:.1f} GB and the driver about {RESERVED / 1e9:.0f} GB, "
        f"and the device has {available / 1e9:.1f} GB. What lowers it: {options}. The estimate by part:\n{estimate}"
    )
