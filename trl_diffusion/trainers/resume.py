"""Saving and resuming, in front of a TRL trainer: only whole checkpoints, and only those of the same run."""

from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from ..resuming.checkpoints import resolve_checkpoint
from .record import RunRecord, compare_with, make_record

if TYPE_CHECKING:  # what the mixin is put in front of
    from transformers import Trainer as _Trainer
else:
    _Trainer = object


class ResumingMixin(_Trainer):
    """Put in front of a trainer, checks what it resumes. The trainer calls `_remember_run` when it is complete."""

    def _remember_run(self) -> None:
        self._run_record = make_record(self)
        self.add_callback(RunRecord(self._run_record))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """
        Train, see [`~transformers.Trainer.train`].

        `resume_from_checkpoint=True` picks the last whole checkpoint. A broken one is refused, and so is one of a run
        with other data, another objective or another order of the rows; other draws are warned of.
        """
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise ValueError(
                f"No weight of the `{type(self.model).__name__}` requires a gradient, so nothing would be trained. "
                "Pass a `peft_config`, load the adapter with `is_trainable=True`, or call `model.requires_grad_(True)`."
            )
        checkpoint = resolve_checkpoint(resume_from_checkpoint, self.args.output_dir)
        if checkpoint and getattr(self.args, "sync_ref_model", False):
            raise ValueError(
                f"`sync_ref_model=True` moves the reference along, and {checkpoint} does not hold it: the run would go "
                "on against the first one. Start anew, without `resume_from_checkpoint`."
            )
        if checkpoint:
            compare_with(checkpoint, self._run_record)
        return super().train(checkpoint, *args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise OSError(
                f"The checkpoint of step {self.state.global_step} could not be written to `output_dir="
                f"{self.args.output_dir!r}`: {error}. Those before it are untouched. Make room, or the folder "
                "writable, and go on with `resume_from_checkpoint=True`, which passes over the broken one."
            ) from error
