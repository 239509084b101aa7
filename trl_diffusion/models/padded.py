"""Whether rows that are padded are computed as without: the trainers pad none, `elbo` and `generate` do."""

import torch
from transformers import PreTrainedModel

from .row_logits import logits_at
from .trying import close, evaluating

_ROW, _PADDING = 6, 3  # tokens


@torch.no_grad()
def check_padding(model: PreTrainedModel, mask_token_id: int, pad_token_id: int) -> None:
    """
    Refuse a model whose logits change with padding on the right, as in `elbo`, or on the left, as `generate` asks.

    Raises:
        ValueError: names the side.
    """
    device = model.get_input_embeddings().weight.device
    tokens = (mask_token_id + 1 + torch.arange(_ROW)).remainder(model.config.vocab_size)
    row = torch.where(tokens == pad_token_id, (tokens + _ROW).remainder(model.config.vocab_size), tokens)
    ids, padding = row[None].to(device), torch.full((1, _PADDING), pad_token_id, device=device)
    real, none, places = torch.ones_like(ids), torch.zeros_like(padding), torch.arange(_ROW, device=device)
    with evaluating(model):
        alone = model(input_ids=ids).logits
        right = model(input_ids=torch.cat([ids, padding], 1), attention_mask=torch.cat([real, none], 1)).logits
        left = logits_at(model, torch.cat([padding, ids], 1), torch.cat([none, real], 1), places + _PADDING)
    for side, logits, what in (("right", right[:, :_ROW], "`elbo` of"), ("left", left, "`generate` for")):
        if not close(logits, alone):
            raise ValueError(
                f"`{type(model).__name__}` has other logits for a row that is padded on the {side}: its "
                "`attention_mask` does not hide padding, or its positions count it. The trainers pad nothing; give "
                f"{what} several rows those of one length together."
            )
