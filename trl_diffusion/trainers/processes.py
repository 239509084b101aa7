"""Many processes: what wraps a model there leaves its score and its gradient alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
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

    def _prepare_input(self, data: Any) -> Any:
        """Under DeepSpeed the Trainer rounds every float of a batch to bfloat16: here, scores of the reference."""
        if isinstance(data, torch.Tensor) and data.is_floating_point():
            return data.to(self.args.device)
        return super()._prepare_input(data)

    @contextmanager
    def _weights_as_in_training(self) -> Iterator[None]:
        """Score a model that FSDP2 has not sharded yet as it will be then: with weights in its `param_dtype`."""
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        policy = plugin and plugin.mixed_precision_policy
        if self.ref_model is not None or policy is None or policy.param_dtype is None:
            yield
            return
        whole = [(p, p.data) for p in self.model.parameters() if p.dtype == torch.float32]
        for parameter, data in whole:
            parameter.data = data.to(policy.param_dtype)
        try:
            yield
        finally:
            for parameter, data in whole:
                parameter.data = data

    def _let_gradients_come_once(self) -> None:
        """
        Undo reentrant layer checkpointing under ZeRO-3; to be called when TRL's constructor has set it.

        It runs a backward of its own for each block of each draw, and DeepSpeed takes one gradient of a weight in a
        step and refuses a second. What TRL asks for it is that a block's weights are gathered again in the backward,
        which they are without.
        """
        if is_deepspeed_zero3_enabled() and self.args.gradient_checkpointing:
            given = self.args.gradient_checkpointing_kwargs or {}
            kwargs = {**given, "use_reentrant": False}
            # TRL has the old name; transformers goes by the new one, and the two may be one dictionary
            self.args.gradient_checkpointing_kwargs = self.args.activation_checkpointing_kwargs = kwargs


def casting_weights_only(policy: Any) -> Any:
    """
    FSDP2's precision policy without its casts of what goes into and comes out of each wrapped module.

    Out of the model comes an ELBO of hundreds of nats, which bfloat16 would round to whole ones. Into a block go the
    rotary angles, which it would round for the policy only: the reference's blocks are not wrapped one by one.
    """
    return replace(policy, output_dtype=None, cast_forward_inputs=False)
