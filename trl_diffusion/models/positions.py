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
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    padded = [t.padding_idx for t in tables if t.num_embeddings == limit and t.padding_idx is not None]
    return limit - max(padded) - 1 if padded and limit != model.config.vocab_size else limit
