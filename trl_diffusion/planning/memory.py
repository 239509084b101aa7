"""
How much memory a training step will need, by part, before anything is loaded.

Nothing is modelled: the step itself is run on fake tensors, which have shapes and no numbers, and its live bytes are
counted (`rehearsal.py`). What is not part of a step of one process is left out: the driver's context and fragmentation
(see `RESERVED`), the buckets of DDP, savings by sharding, and what the optimiser's own step makes for a moment.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedConfig, PreTrainedModel

from ..models.families import family_of
from ..scoring.adapters import base_of
from ..scoring.gradients import GRADIENT_MODES, choose_gradient_mode, trainable_parameters
from ..scoring.responses import TOKENS_PER_FORWARD, draws_per_chunk
from .live_bytes import nbytes
from .rehearsal import Counted, Step, rehearse
from .skeleton import tensors_of, without_memory

# What a device holds besides: the driver's context, cuBLAS workspaces, gaps between blocks
RESERVED = 1_000_000_000


@dataclass(frozen=True)
class MemoryEstimate:
    """
    Bytes of a training step by part. `str()` is a table of them.

    Args:
        weights: of the model, quantised or not.
        reference: a second copy of the weights, where the reference is one.
        adapters: weights beside the model's own.
        gradients: of earlier micro-batches, where they are accumulated.
        optimizer: state of the optimiser.
        kept: what the forward leaves for the backward of the loss: a gradient for each response (immediate), nearly
            nothing (checkpoint), or all activations (graph); and casts of weights under autocast.
        working: what is there besides at the worst moment: activations of a chunk of draws, logits, new gradients.
    """

    weights: int
    reference: int
    adapters: int
    gradients: int
    optimizer: int
    kept: int
    working: int

    @property
    def total(self) -> int:
        """All parts."""
        return sum(getattr(self, field.name) for field in fields(self))

    def __str__(self) -> str:
        rows = [(field.name, getattr(self, field.name)) for field in fields(self)] + [("total", self.total)]
        return "\n".join(f"{name:<12}{size / 1e9:>8.2f} GB" for name, size in rows)


def estimate_memory(
    config: PreTrainedConfig | torch.nn.Module,
    *,
    max_length: int = 1024,
    response_length: int | None = None,
    num_responses: int = 2,
    num_mc_samples: int = 4,
    draws_per_forward: int | None = None,
    peft_config: Any = None,
    quantization_config: Any = None,
    dtype: str = "bfloat16",
    bf16: bool = True,
    gradient_checkpointing: bool = True,
    gradient_accumulation_steps: int = 1,
    elbo_gradient: str = "auto",
    separate_reference: bool | None = None,
    optimizer_bytes: int | None = None,
    device: str = "cuda",
) -> MemoryEstimate:
    """
    Bytes that a training step needs at its peak: the step is run on fake tensors, which takes a few seconds.

    Args:
        config: of the model. Or a model, whose weights are counted as they are.
        max_length: tokens of prompt and response together, in the longest example.
        response_length: tokens of its response, which are all hidden in the worst draw; by default all.
        num_responses: responses of a micro-batch: two for each pair, one for each row of unpaired feedback.
        num_mc_samples: draws per response. Without effect, unless they all fit in one chunk or `elbo_gradient="graph"`.
        draws_per_forward: as in the trainers' arguments.
        peft_config: the adapter, as for the trainers; without one all weights are trained.
        quantization_config: as for the trainers, of bitsandbytes.
        dtype: of the weights that are not quantised.
        bf16: whether computations run in bfloat16 (autocast), as in the trainers' arguments.
        gradient_checkpointing: as in the trainers' arguments.
        gradient_accumulation_steps: as in the trainers' arguments; it matters whether there are several.
        elbo_gradient: as in the trainers' arguments.
        separate_reference: whether the reference is a copy of the weights; by default, if there is no adapter.
        optimizer_bytes: state per trained weight, 2 for Adam in 8 bits; by default two numbers in the precision of the
            weight, which is what torch's Adam keeps.
        device: type of the device it will run on; it does not have to be there. On the CPU, TRL's kernel of the output
            head makes copies of the logits.

    Returns:
        [`MemoryEstimate`].

    Raises:
        ValueError: a value that is not understood, what is not a model of transformers with an output head, or a model
            whose step asks for more than shapes.
    """
    _refuse(max_length, response_length, elbo_gradient)
    _refuse_model(config, peft_config, quantization_config)
    model = config
    if isinstance(config, PreTrainedConfig):
        model = without_memory(config, dtype, peft_config, quantization_config)
    _refuse_headless(model)
    length = length_of_largest_chunk(model, max_length, num_mc_samples, draws_per_forward)
    step = Step(
        length=length,
        response_length=min(length, response_length or max_length),
        num_responses=num_responses,
        num_mc_samples=num_mc_samples,
        draws_per_forward=draws_per_forward,
        elbo_gradient=choose_gradient_mode(elbo_gradient, model, num_responses=num_responses)[0],
        bf16=bf16,
        layers=gradient_checkpointing,
        accumulates=gradient_accumulation_steps > 1,
        is_on_gpu=device != "cpu",
    )
    return _by_part(model, step, _rehearse(model, step), separate_reference, optimizer_bytes)


def _refuse_model(config: Any, peft_config: Any, quantization_config: Any) -> None:
    if isinstance(config, PreTrainedConfig):
        return
    if not isinstance(config, PreTrainedModel | PeftModel):
        name = type(config).__name__
        raise ValueError(f"`config` must be a configuration or a model of transformers, or a PEFT model, got {name}.")
    for name, given in (("peft_config", peft_config), ("quantization_config", quantization_config)):
        if given is not None:
            raise ValueError(
                f"`{name}` is for a configuration, and a model was passed, which is counted as it is. Pass "
                "`model.config`, or the model with its adapter (`peft.get_peft_model`), loaded as it will be trained."
            )


def _refuse(max_length: int, response_length: int | None, elbo_gradient: str) -> None:
    if not 1 <= (response_length or max_length) <= max_length:
        raise ValueError(
            f"`response_length` must be at least 1 and at most `max_length`, got response_length={response_length} and "
            f"max_length={max_length}."
        )
    if elbo_gradient not in GRADIENT_MODES:
        raise ValueError(f"`elbo_gradient` must be one of {GRADIENT_MODES}, got {elbo_gradient!r}.")


def _refuse_headless(model: Any) -> None:
    base = base_of(model)
    if base.get_output_embeddings() is None or base.base_model is base:
        raise ValueError(f"`{type(base).__name__}` has no output head over a backbone, so there is nothing to score.")


def _rehearse(model: Any, step: Step) -> Counted:
    try:
        return rehearse(model, step)
    except Exception as error:  # of any code that a model may run
        raise ValueError(
            f"A step of `{type(model).__name__}` cannot be counted, since it does not run on tensors without numbers "
            f"({type(error).__name__}: {error})."
        ) from error


def _by_part(
    model: torch.nn.Module,
    step: Step,
    counted: Counted,
    separate_reference: bool | None,
    optimizer_bytes: int | None,
) -> MemoryEstimate:
    trained = trainable_parameters(model)
    adapters = nbytes(_adapters(model))
    weights = nbytes(tensors_of(model)) - adapters
    is_copied = not adapters if separate_reference is None else separate_reference
    return MemoryEstimate(
        weights=weights,
        reference=weights if is_copied else 0,
        adapters=adapters,
        gradients=nbytes(trained) if step.accumulates else 0,
        optimizer=2 * nbytes(trained) if optimizer_bytes is None else optimizer_bytes * sum(p.numel() for p in trained),
        kept=counted.kept,
        working=counted.peak - counted.kept,
    )


def _adapters(model: Any) -> Iterable[torch.Tensor]:
    if not isinstance(model, PeftModel):
        return []
    own = (model.base_model.prefix, "modules_to_save.")
    return [weight for name, weight in model.named_parameters() if any(part in name for part in own)]


def length_of_largest_chunk(model: Any, longest: int, num_mc_samples: int, draws_per_forward: int | None) -> int:
    """Of responses of up to `longest` tokens, the length whose chunk holds most: of a shorter one more draws fit."""
    draws = draws_per_chunk(longest, draws_per_forward)
    shorter = TOKENS_PER_FORWARD // (draws + 1)
    in_blocks = family_of(model.config).in_blocks  # only a part of a response is run
    if draws_per_forward is not None or draws >= num_mc_samples or not shorter or in_blocks:
        return longest
    power = 2 if model.config._attn_implementation == "eager" else 1  # scores of all pairs of tokens are kept
    return max((longest, shorter), key=lambda length: draws_per_chunk(length, None) * length**power)


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
