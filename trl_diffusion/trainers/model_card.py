"""The model card of a trained checkpoint, with the sampler in the place of TRL's text-generation pipeline."""

from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData


def write_model_card(
    path: Path,
    *,
    model_name: str,
    hub_model_id: str | None,
    base_model: str | None,
    dataset_name: str | None,
    tags: list[str],
    estimator: str,
    trainer_name: str,
    paper: dict[str, Any],
) -> None:
    """
    Write `README.md` for a checkpoint.

    Args:
        path: of the file.
        model_name: title of the card.
        hub_model_id: where the model will be, for the snippet; `model_name` if there is no such place.
        base_model: model it was trained from, if that has a name on the hub.
        dataset_name: data it was trained on, likewise.
        tags: of the card.
        estimator: the estimator of the ELBO, in words.
        trainer_name: name of the method.
        paper: its `title`, `id` and `citation`.
    """
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
        hub_model_id=hub_model_id or model_name,
        base_model=base_model,
        dataset_name=dataset_name,
        estimator=estimator,
        trainer_name=trainer_name,
        paper_title=paper["title"],
        paper_id=paper["id"],
        trainer_citation=paper["citation"],
        versions={name: version(name) for name in ("trl_diffusion", "trl", "transformers", "torch", "datasets")},
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    card.save(path)
