"""Running values over past steps, which draws go by. As a part of a checkpoint they travel in `trainer_state.json`."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..estimators.draws import MaskDraws
from ..estimators.kappa import RunningKappa
from ..scoring.head import FIXED_NONCE, ELBOHeadOutput

if TYPE_CHECKING:  # what the mixin is put in front of
    from transformers import Trainer as _Trainer
else:
    _Trainer = object

Callback = TypeVar("Callback")


class RunningMixin(_Trainer):
    """Put in front of a trainer: its draws, and what they learn from past steps."""

    _sampler: Any
    _diagnostics: Any
    _metrics: Any

    def _draw(self, maskable: Any, rows: Any, attention_mask: Any, nonce: int, blocks: Any = None) -> MaskDraws:
        """The sampler, with the kappa that was learnt so far; evaluation keeps the one of the start."""
        callback = self._callback(RunningKappaCallback)
        kappa = callback.kappa.value if callback and nonce != FIXED_NONCE else None
        return self._sampler(maskable, rows, attention_mask, nonce, kappa, blocks)

    def _learn_kappa(self, outputs: list[ELBOHeadOutput], pairs: bool) -> None:
        """Put what a batch says of kappa with what this step has said, and log the one that it was drawn with."""
        callback = self._callback(RunningKappaCallback)
        if callback and self.model.training:
            if callback.kappa.count:
                self._metrics["train"]["elbo/kappa"].append(callback.kappa.value)
            moments = self.accelerator.reduce(self._diagnostics.kappa_moments(outputs, pairs), reduction="sum")
            callback.kappa.observe(*moments.tolist())

    def _callback(self, kind: type[Callback]) -> Callback | None:
        """The callback of a kind that keeps a running state; a resumed run has made a new one."""
        return next((each for each in self.callback_handler.callbacks if isinstance(each, kind)), None)


class RunningKappaCallback(TrainerCallback, ExportableState):
    """
    The kappa of an adaptive control variate: the same within a step, moved at its end, saved and restored.

    Args:
        initial: kappa before anything was seen.
    """

    def __init__(self, initial: float):
        self.kappa = RunningKappa(initial)

    def state(self) -> dict[str, Any]:
        return {"args": {"initial": self.kappa.initial}, "attributes": {"saved": asdict(self.kappa)}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # By default a run whose reference was stored until now, of which is warned, begins to learn
        if args.control_variate is None:
            state.stateful_callbacks.setdefault(type(self).__name__, self.state())
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
