"""A model by its path, loaded to be asked and not to be trained."""

from typing import Any

from ..checks.launch import check_launch_to_use
from ..models.denoiser import resolve_mask_token_id
from ..trainers.loading import find_model, load_model, load_tokenizer, put_adapter


def load_ready(path: str, options: dict[str, Any], adapter: str | None = None) -> tuple[Any, Any]:
    """
    Load a model and its tokenizer.

    Args:
        path: of the model, or of an adapter that says where its base model is.
        options: of `from_pretrained`.
        adapter: path of an adapter to put on the model, whatever it says of its base.

    Raises:
        OSError: there is no such model.
        ValueError: the launch shards weights, or the adapter does not fit.
    """
    check_launch_to_use()
    source = find_model(path, options)
    tokenizer = load_tokenizer(source, options)
    model = load_model(source, options)
    if adapter is not None:
        model = put_adapter(model, adapter)
    model.config.mask_token_id = resolve_mask_token_id(source.config, tokenizer)
    return model.eval().requires_grad_(False), tokenizer
