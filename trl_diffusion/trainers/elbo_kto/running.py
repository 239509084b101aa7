"""The running means of the log-ratio as part of a checkpoint, as `trainers/running.py` has it."""

from dataclasses import asdict
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..running import saved_of
from .baselines import RunningMeans


class RunningMeansCallback(TrainerCallback, ExportableState):
    """
    Saves [`RunningMeans`] with the trainer's state, and restores them when training resumes.

    Args:
        decay: of the running means.
    """

    def __init__(self, decay: float):
        self.means = RunningMeans(decay)

    def state(self) -> dict[str, Any]:
        return {"args": {"decay": self.means.decay}, "attributes": {"saved": asdict(self.means)}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        saved = saved_of(self, state, "running means of the log-ratio", f"baseline={args.baseline!r}")
        if saved["decay"] != self.means.decay:
            raise ValueError(
                f"The checkpoint was trained with `ema_decay={saved['decay']}`, and this run has {self.means.decay}."
            )
        self.means = RunningMeans(**saved)
