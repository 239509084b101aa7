"""
How the gradient of an ELBO reaches the weights, and what is kept for it.

The loss is a function of ELBOs, one number per response, so its gradient is  sum_b dLoss/dELBO_b * grad ELBO_b.  The
gradient of a response's ELBO does not depend on the loss, and can be had before the loss is known:

- `"immediate"`: forward and backward per chunk of draws, inside the forward. What is kept is one gradient per response,
  the size of the trainable weights; the backward of the loss only scales and adds. Nothing is computed twice. For
  adapters and small models, whose gradient is small.
- `"checkpoint"`: nothing is kept but the inputs of each chunk, and its forward is run again in the backward. Works
  wherever autograd does; one more forward.
- `"graph"`: plain autograd, every chunk's activations kept. Memory grows with the number of draws: for comparison.

All three give the same gradient.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from .responses import Chunk

GRADIENT_MODES = ("auto", "immediate", "checkpoint", "graph")

Gradient = tuple[torch.Tensor | None, ...]  # by weight; none where the score does not depend on it


@dataclass(frozen=True)
class Score:
    """
    How the draws of one response are scored.

    Args:
        of_chunk: a chunk of draws, and what all draws share, to `(k, T)` log-probabilities.
        shared: makes what they share, if they do.
    """

    of_chunk: Callable[..., torch.Tensor]
    shared: Callable[[], tuple[torch.Tensor, ...]] | None = None


SHARDED = "the weights are sharded (FSDP, ZeRO-3) and gathered by hooks that an inner backward does not run"
SCALED = "the loss is scaled (fp16), and an inner backward runs before the scale is known"


# Bytes of waiting gradients that any device has room for
SMALL = 1_000_000_000


def choose_gradient_mode(
    mode: str, model: torch.nn.Module, obstacle: str = "", num_responses: int = 2
) -> tuple[str, str]:
    """
    What a mode means for a model, and why.

    `"auto"` is decided by bytes: immediate if the gradients that wait, one in float32 for each response, take at most
    a quarter of the bytes of the weights, or at most a gigabyte; else checkpoint, which costs one more forward.

    Args:
        mode: one of [`GRADIENT_MODES`].
        model: whose weights are trained.
        obstacle: what else is known against an immediate gradient.
        num_responses: responses of a micro-batch.

    Raises:
        ValueError: `"immediate"` where it cannot be exact.
    """
    if mode not in ("auto", "immediate"):
        return mode, "it was asked for"
    obstacle = obstacle or _obstacle_to_immediate(model)
    if mode == "immediate":
        refuse_immediate(obstacle)
        return mode, "it was asked for"
    if obstacle:
        return "checkpoint", obstacle
    waiting = waiting_bytes(model, num_responses)
    room = max(SMALL, sum(p.nbytes for p in model.parameters()) // 4)
    what = f"a gradient for each of {num_responses} responses takes {waiting / 1e9:.2f} GB"
    if waiting <= room:
        return "immediate", f"{what}, which is little (at most {room / 1e9:.2f})"
    return "checkpoint", f"{what}, which is much (more than {room / 1e9:.2f})"


def waiting_bytes(model: torch.nn.Module, num_responses: int) -> int:
    """Of the gradients that wait for the loss in immediate mode: one in float32 for each response."""
    return 4 * num_responses * sum(parameter.numel() for parameter in trainable_parameters(model))


def refuse_immediate(obstacle: str) -> None:
    """Raise if there is an obstacle to `elbo_gradient="immediate"`."""
    if obstacle:
        raise ValueError(f"`elbo_gradient='immediate'` cannot be used: {obstacle}. Set `elbo_gradient='checkpoint'`.")


def _obstacle_to_immediate(model: torch.nn.Module) -> str:
    """Why a gradient taken inside the forward would not be that of the weights; empty if it is."""
    if any(hasattr(p, "full_tensor") or hasattr(p, "ds_id") for p in trainable_parameters(model)):
        return SHARDED
    for module in model.modules():
        kwargs = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {})
        if getattr(module, "gradient_checkpointing", False) and kwargs.get("use_reentrant"):
            return "layer checkpointing is reentrant, which an inner backward cannot go through"
    return ""


def trainable_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The weights that a gradient is wanted for, each once."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def score_with_graph(score: Score, chunks: Sequence[Chunk], mode: str) -> torch.Tensor:
    """`(K, T)` log-probabilities of one response from the scores of chunks of its draws, attached to the graph."""
    run = _run_again if mode == "checkpoint" and torch.is_grad_enabled() else _run
    shared = () if score.shared is None else run(score.shared)
    return torch.cat([run(score.of_chunk, chunk, *shared) for chunk in chunks])


def _run(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


def _run_again(function: Callable[..., Any], *arguments: Any) -> Any:
    """And once more in the backward."""
    return checkpoint(function, *arguments, use_reentrant=False)


def score_with_gradient(
    score: Score, chunks: Sequence[Chunk], parameters: list[torch.nn.Parameter]
) -> tuple[torch.Tensor, Gradient]:
    """
    The same, detached, and the gradient of the response's ELBO.

    What draws share is run once, and is cut off: the backward of a chunk ends there, and the sum of what arrives goes
    on from there, once.

    Args:
        score: of the response.
        chunks: of draws.
        parameters: what to differentiate by.
    """
    with torch.enable_grad():
        shared = () if score.shared is None else score.shared()
    ends = [part.detach().requires_grad_(part.requires_grad) for part in shared]
    wanted = parameters + [end for end in ends if end.requires_grad]
    total: list[torch.Tensor | None] = [None] * len(wanted)
    log_probs = []
    for chunk in chunks:
        with torch.enable_grad():
            scored = score.of_chunk(chunk, *ends)
            elbo = (scored * chunk.weight).sum()
        # Not kept in a variable: it would be there during the next chunk
        for i, gradient in enumerate(torch.autograd.grad(elbo, wanted, allow_unused=True)):
            total[i] = _add(total[i], gradient)
        log_probs.append(scored.detach())
    total, arrived = total[: len(parameters)], total[len(parameters) :]
    for i, more in enumerate(_going_on([part for part in shared if part.requires_grad], arrived, parameters)):
        total[i] = _add(total[i], more)
    return torch.cat(log_probs), tuple(total)


def _going_on(
    shared: Sequence[torch.Tensor], arrived: Sequence[torch.Tensor | None], parameters: list[torch.nn.Parameter]
) -> Gradient:
    """The gradient by `parameters`, of what arrived at tensors that were computed from them."""
    known = [
        (part, gradient.to(part.dtype)) for part, gradient in zip(shared, arrived, strict=True) if gradient is not None
    ]
    if not known:
        return ()
    parts, gradients = zip(*known, strict=True)
    return torch.autograd.grad(parts, parameters, gradients, allow_unused=True)


def _add(total: torch.Tensor | None, gradient: torch.Tensor | None) -> torch.Tensor | None:
    """Their sum, in place; not in the precision of the weights, since those of many draws are added."""
    if gradient is None:
        return total
    if total is None:
        return gradient.to(torch.promote_types(gradient.dtype, torch.float32), copy=True)
    total += gradient
    return total


def carry_gradients(
    terms: torch.Tensor, maskable: torch.Tensor, gradients: Sequence[Gradient], parameters: list[torch.nn.Parameter]
) -> torch.Tensor:
    """
    Attach known gradients to detached ELBO terms, so that a loss of their sums over tokens has the right gradient.

    Args:
        terms: `(B, L)` ELBO terms.
        maskable: `(B, L)` the tokens of each response.
        gradients: of each row's ELBO.
        parameters: what they are gradients of.

    Returns:
        `(B, L)` the terms. The backward raises `ValueError` for a loss that treats the tokens of a response
        differently, whose gradient is not known.
    """
    return _Known.apply(terms, maskable, gradients, *parameters)


class _Known(torch.autograd.Function):
    """ELBO terms whose sum over row b has the gradient `gradients[b]`."""

    @staticmethod
    def forward(
        ctx: Any,
        terms: torch.Tensor,
        maskable: torch.Tensor,
        gradients: Sequence[Gradient],
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        # Saved as autograd saves its own: freed after the backward, with its message for a second one
        ctx.save_for_backward(maskable, *(gradient for row in gradients for gradient in row))
        ctx.dtypes = [parameter.dtype for parameter in parameters]
        return terms.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        maskable, *gradients = ctx.saved_tensors
        scales = grad_output.gather(1, maskable.int().argmax(1, keepdim=True))  # (B, 1), of the first token
        if bool((((grad_output - scales).abs() > 0) & maskable).any()):
            raise ValueError(
                "`elbo_gradient='immediate'` knows the gradient of a response's ELBO, and this loss weighs the tokens "
                "of a response differently. Set `elbo_gradient='checkpoint'`."
            )
        number = len(ctx.dtypes)
        totals = [_weighted_sum(scales, gradients[i::number], dtype) for i, dtype in enumerate(ctx.dtypes)]
        return (None, None, None, *totals)


def _weighted_sum(scales: torch.Tensor, rows: Sequence[torch.Tensor | None], dtype: torch.dtype) -> torch.Tensor | None:
    """Of the gradients of one weight, row by row, so that one more is all that is held."""
    total: torch.Tensor | None = None
    for scale, row in zip(scales, rows, strict=True):
        if row is not None:
            scale = scale.to(row.device)  # the weights of one model may lie on several devices
            total = row * scale if total is None else total.addcmul_(row, scale)
    return None if total is None else total.to(dtype)
