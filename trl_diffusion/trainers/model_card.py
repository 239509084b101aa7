"""The model card of a trained checkpoint, which shows how its family is loaded and sampled."""

from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import ModelCard, ModelCardData

from .._version import __version__
from ..models.end_of_text import added_tokens
from ..models.families import family_of
from ..scoring.adapters import base_of

_LIBRARIES = ("trl", "transformers", "torch", "datasets")


def write_model_card(
    trainer: Any, model_name: str | None, dataset_name: str | None, tags: str | list[str] | None
) -> None:
    """
    Write `README.md` for a checkpoint into the trainer's output folder.

    Args:
        trainer: one of this package's.
        model_name: title of the card; the folder's name if there is none.
        dataset_name: data it was trained on, if that has a name on the hub.
        tags: of the card, besides the trainer's.
    """
    folder, model = Path(trainer.args.output_dir), base_of(trainer.accelerator.unwrap_model(trainer.model))
    model_name = model_name or folder.name
    base_model = getattr(trainer.model.config, "_name_or_path", "")
    base_model, dataset_name = (  # the hub takes names of its own only
        name if name and not Path(name).exists() else None for name in (base_model, dataset_name)
    )
    tags = [*trainer._tag_names, *([tags] if isinstance(tags, str) else tags or [])]
    card = ModelCard.from_template(
        ModelCardData(
            base_model=base_model,
            datasets=dataset_name,
            library_name="transformers",
            model_name=model_name,
            tags=["generated_from_trainer", *sorted(tags)],
        ),
        template_path=str(files("trl_diffusion.trainers") / "templates" / "model_card.md"),
        model_name=model_name,
        hub_model_id=trainer.hub_model_id or model_name,
        base_model=base_model,
        dataset_name=dataset_name,
        auto_class=_class_name(model),
        conversational=trainer._tokenizer.chat_template is not None,
        beginning=_beginning(trainer._tokenizer),
        auto_class_is_ours=not hasattr(transformers, _class_name(model)),
        in_blocks=family_of(model.config).in_blocks,
        estimator=trainer.args.describe_estimator(),
        trainer_name=trainer._name,
        paper_title=trainer._paper["title"],
        paper_id=trainer._paper["id"],
        trainer_citation=trainer._paper["citation"],
        versions={"trl_diffusion": __version__, **{name: version(name) for name in _LIBRARIES}},
    )
    folder.mkdir(parents=True, exist_ok=True)
    card.save(folder / "README.md")


def _beginning(tokenizer: Any) -> str:
    """What the tokenizer puts before a text, as a text: a prompt begins as in training, and does not end."""
    before, _ = added_tokens(tokenizer)
    return f"{tokenizer.decode(before)} " if before else ""


def _class_name(model: Any) -> str:
    """Of the class of transformers that loads the model: its family's, or its own."""
    own = type(model).__name__ if type(model).__module__.startswith("transformers.") else "AutoModelForCausalLM"
    return family_of(model.config).auto_class or own
