"""A checkpoint is loaded whole, or refused: half of another architecture would train, and score, as noise."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what the mixin is put in front of
    from transformers import PreTrainedModel as _Model
else:
    _Model = object


class WholeCheckpointMixin(_Model):
    """Put in front of a model of transformers, which warns of tensors that a checkpoint lacks, and invents them."""

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """
        Load a checkpoint, see [`~transformers.PreTrainedModel.from_pretrained`].

        Raises:
            ValueError: the checkpoint lacks tensors of this architecture, or has others.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        refuse_lacking(model, info)
        _refuse(model, info["unexpected_keys"], "has, which this architecture has not,")
        return (model, info) if output_loading_info else model


@dataclass(frozen=True)
class Whole:
    """
    A class of transformers, or an auto class, that loads a checkpoint whole.

    What a checkpoint has beside the model is let be: encoders come with the heads of their other objectives.

    Args:
        architecture: the class.
    """

    architecture: Any

    def from_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """
        Load a checkpoint, see [`~transformers.PreTrainedModel.from_pretrained`].

        Raises:
            ValueError: the checkpoint lacks tensors of this architecture.
        """
        model, info = self.architecture.from_pretrained(*args, output_loading_info=True, **kwargs)
        refuse_lacking(model, info)
        return model


def refuse_lacking(model: Any, info: dict[str, Any]) -> None:
    """Refuse a model of whose tensors some were not in the checkpoint, by what loading it told."""
    _refuse(model, info["missing_keys"], "lacks")


def _refuse(model: Any, names: Collection[str], what: str) -> None:
    if not names:
        return
    raise ValueError(
        f"The checkpoint of model_type={model.config.model_type!r} {what} {len(names)} tensors, `{min(names)}` for "
        f"instance: its weights are of another architecture than `{type(model).__name__}`, and what is missing would "
        "be random. Correct `model_type` in its config.json, or load it with the class that wrote it."
    )
