"""How many tokens a model has positions for."""

from torch import nn
from transformers import PreTrainedModel


def position_limit(model: PreTrainedModel) -> int | None:
    """
    The longest row in tokens, `config.max_position_embeddings`; None if the model's configuration sets no limit.

    A table with a row for padding (RoBERTa) counts positions from the row after it, so that as many are lost.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None:
        return None
    padded = [table.padding_idx for table in _tables(model, limit) if table.padding_idx is not None]
    return limit - max(padded) - 1 if padded else limit


def counts_from_the_left(model: PreTrainedModel) -> bool:
    """
    Whether the model goes by places in a row, which padding on the left moves: learnt ones, or an attention that
    sharpens with them (Ministral's). Rotary positions are of distances only.
    """
    config = model.config.get_text_config()
    limit, rope = getattr(config, "max_position_embeddings", None), getattr(config, "rope_parameters", None) or {}
    return bool(rope.get("llama_4_scaling_beta")) or (limit is not None and bool(_tables(model, limit)))


def _tables(model: PreTrainedModel, size: int) -> list[nn.Embedding]:
    """Embeddings with that many rows that are not those of the tokens."""
    of_tokens = set(model.get_input_embeddings().modules())
    found = [module for module in model.modules() if isinstance(module, nn.Embedding) and module not in of_tokens]
    return [table for table in found if table.num_embeddings == size]
