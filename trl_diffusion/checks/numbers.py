"""Numbers that are not finite: which example they came from, and none of them reaches the weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback

from ..estimators.elbo import NonFiniteError

_SHOWN = 160  # characters of an example in a message


@contextmanager
def naming_the_example(inputs: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Add the text of the example to a [`NonFiniteError`] raised inside the block, which knows its row only."""
    try:
        yield
    except NonFiniteError as error:
        # Already named, or perhaps a row of KTO's mismatched pairs
        if isinstance(error.__cause__, NonFiniteError) or "KL_input_ids" in inputs:
            raise
        ids = inputs["input_ids"][error.row][inputs["attention_mask"][error.row].bool()]
        text = tokenizer.decode(ids)
        shown = repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "...")
        raise NonFiniteError(f"{error} The example is {shown}.", error.row, error.draw) from error


class FiniteGradients(TrainerCallback):
    """
    Stops before a gradient that is not finite reaches the weights, and where there is none to reach them.

    Clipping turns one infinite element into NaN everywhere, transformers leaves NaN losses out of its log, and the next
    checkpoint would hold NaN weights.
    """

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = kwargs["optimizer"]
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not gradients and not _are_kept_elsewhere(args):
            raise RuntimeError(
                f"At step {state.global_step + 1} no weight of the optimiser has a gradient: nothing would be trained. "
                "An optimiser that was made before the trainer, and passed as `optimizers`, does not have the adapter "
                "that `peft_config` makes: leave `optimizers` out. Otherwise what is trained is no part of the score."
            )
        if args.fp16:  # its scaler skips such steps, and counts on meeting some
            return
        gradients = [gradient.to_local() if hasattr(gradient, "to_local") else gradient for gradient in gradients]
        gradients = [gradient for gradient in gradients if gradient.numel()]
        if not gradients or bool(torch.isfinite(torch.stack(_largest(gradients))).all()):
            return
        raise FloatingPointError(
            f"The gradient of step {state.global_step + 1} is not finite. The optimiser has not used it: the weights "
            f"are those of step {state.global_step}, and checkpoints are unharmed. Resume from the last one with a "
            "lower `learning_rate`, in float32 or bfloat16, or without the rows of this step."
        )


def _are_kept_elsewhere(args: Any) -> bool:
    """Whether weights have no gradients at a step: DeepSpeed keeps them, and some optimisers step in the backward."""
    return args.deepspeed_plugin is not None or any(kind in args.optim.value for kind in ("lomo", "layerwise"))


def _largest(gradients: list[torch.Tensor]) -> list[torch.Tensor]:
    """The largest magnitude of each, on one device."""
    device = gradients[0].device
    return [norm.float().to(device) for norm in torch._foreach_norm(gradients, ord=float("inf"))]
