"""Many processes: what wraps a model there leaves its score and its gradient alone."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

if TYPE_CHECKING:  # what the mixin is put in front of
    from transformers import Trainer as _Trainer
else:
    _Trainer = object


class ProcessesMixin(_Trainer):
    """Put in front of a trainer."""

    def create_accelerator_and_postprocess(self) -> None:
        """Called by the Trainer's constructor, before anything is wrapped."""
        super().create_accelerator_and_postprocess()
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and plugin.fsdp_version == 2 and plugin.mixed_precision_policy is not None:
            plugin.mixed_precision_policy = casting_weights_only(plugin.mixed_precision_policy)

    def _let_gradients_come_once(self) -> None:
        """
        Undo reentrant layer checkpointing under ZeRO-3; to be called when TRL's constructor has set it.

        It runs a backward of its own for each block of each draw, and DeepSpeed takes one gradient of a weight in a
        step and refuses a second. What TRL asks for it is that a block's weights are gathered again in the backward,
        which they are without.
        """
        if is_deepspeed_zero3_enabled() and self.args.gradient_checkpointing:
            given = self.args.gradient_checkpointing_kwargs or {}
            self.args.gradient_checkpointing_kwargs = {**given, "use_reentrant": False}


def casting_weights_only(policy: Any) -> Any:
    """
    FSDP2's precision policy without its casts of what goes into and comes out of each wrapped module.

    Out of the model comes an ELBO of hundreds of nats, which bfloat16 would round to whole ones. Into a block go the
    rotary angles, which it would round for the policy only: the reference's blocks are not wrapped one by one.
    """
    return replace(policy, output_dtype=None, cast_forward_inputs=False)
