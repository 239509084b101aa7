"""Running values over past steps as part of a checkpoint: they travel in `trainer_state.json`."""

from dataclasses import asdict
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..estimators.kappa import RunningKappa


class RunningKappaCallback(TrainerCallback, ExportableState):
    """
    The kappa of `control_variate="adaptive"`: the same within a step, moved at its end, saved and restored.

    Args:
        initial: kappa before anything was seen.
    """

    def __init__(self, initial: float):
        self.kappa = RunningKappa(initial)

    def state(self) -> dict[str, Any]:
        return {"args": {"initial": self.kappa.initial}, "attributes": {"saved": asdict(self.kappa)}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        saved = saved_of(self, state, "running moments of the control variate", "control_variate='adaptive'")
        self.kappa = RunningKappa(**saved)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.kappa.end_step()


def saved_of(callback: TrainerCallback, state: Any, what: str, option: str) -> dict[str, Any]:
    """What the checkpoint, or the callback itself at a fresh start, has stored of it."""
    stored = state.stateful_callbacks.get(type(callback).__name__)
    if stored is None:
        name = option.split("=")[0]
        raise ValueError(
            f"The checkpoint has no {what}: it was trained with another `{name}`. Resume with that one, or start anew "
            f"with `{option}`."
        )
    return stored["attributes"]["saved"]
