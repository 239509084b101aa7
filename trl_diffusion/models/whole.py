"""A checkpoint is loaded whole, or refused: half of another architecture would train, and score, as noise."""

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
        for found, what in (("missing_keys", "lacks"), ("unexpected_keys", "has, which this architecture has not,")):
            names = sorted(info[found])
            if names:
                raise ValueError(
                    f"The checkpoint of model_type={model.config.model_type!r} {what} {len(names)} tensors, "
                    f"`{names[0]}` for instance: its weights are of another architecture than `{cls.__name__}`, and "
                    "what is missing would be random. Correct `model_type` in its config.json, or load it with the "
                    "class that wrote it."
                )
        return (model, info) if output_loading_info else model
