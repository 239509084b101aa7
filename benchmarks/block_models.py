"""
Small SDARs that are pre-trained on a CPU, by the block ELBO.

`DiffusionSFTTrainer` has the same loss and runs each row alone, which for rows of forty tokens takes six times as long.
So rows of one prompt length and one length are run together here, without padding.
"""

import random
import sys
from pathlib import Path

import grammar_text
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import word_problems

from trl_diffusion import draw_masks
from trl_diffusion.estimators.elbo import noise_inputs
from trl_diffusion.models import SDARConfig
from trl_diffusion.models.blocks import doubled
from trl_diffusion.models.families import blocks_of
from trl_diffusion.models.logits import hidden_states, logits_of

STORIES, STEPS, TOKENS_PER_STEP = (24, 32, 48, 64, 96), 600, 1024  # words, the short ones first


def make_sdar(tokenizer: PreTrainedTokenizerBase, block: int, width: int, layers: int, longest: int):
    """An SDAR with blocks of so many tokens; heads of 16 numbers, two of which share keys and values."""
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("mask", "pad", "eos", "bos")}
    heads = {"num_attention_heads": width // 16, "num_key_value_heads": width // 32, "head_dim": 16}
    sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers, **heads}
    sizes |= {"vocab_size": len(tokenizer), "max_position_embeddings": longest, "initializer_range": 0.05}
    return AutoModelForCausalLM.from_config(SDARConfig(**sizes, **special, block_size=block))


def block_loss(model, ids: torch.Tensor, prompt: int, seed: int) -> torch.Tensor:
    """
    The negative ELBO per token of rows `(B, L)` whose first `prompt` tokens are shown: one draw, which hides something
    of every block, and one forward of [clean ; noised].
    """
    maskable = (torch.arange(ids.shape[1]) >= prompt).expand(ids.shape)
    blocks = blocks_of(model.config, maskable, torch.ones_like(maskable))
    draws = draw_masks(maskable, 1, seed=seed, rows=ids, blocks=blocks)
    numbers, last = blocks[0], ids.shape[1]
    first = int((numbers < numbers[prompt]).sum())  # a response may begin inside a block
    clean = int((numbers < numbers[-1]).sum())
    masked, copied = draws.masked[0, :, first:], ids[:, first:]
    rows = torch.cat([ids[:, :clean], noise_inputs(copied, masked, model.config.mask_token_id)], dim=1)
    hidden = hidden_states(model, rows, **doubled(model, numbers, first, last, clean))[:, clean:]
    nll = nn.functional.cross_entropy(logits_of(model, hidden[masked]), copied[masked], reduction="none")
    return (nll * draws.weight[0, :, first:][masked]).sum() / maskable.sum()


def pretrain_on_stories(block: int, seed: int):
    """The tokenizer of `grammar_text.py`, and an SDAR that tells its stories."""
    torch.manual_seed(seed)
    tokenizer, rng = grammar_text.make_tokenizer(), random.Random(seed)
    model = make_sdar(tokenizer, block, width=96, layers=2, longest=160)

    def loss_of(step: int) -> torch.Tensor:
        length = rng.choice(STORIES[: 2 + round(3 * min(1.0, 2 * step / STEPS))])
        ids, prompt = grammar_text.make_batch(tokenizer, length, TOKENS_PER_STEP // (length + 22), rng)
        return block_loss(model, ids, prompt, step)

    word_problems.train(model, loss_of, STEPS, decay=0.01, label="pre-training on stories")
    return tokenizer, model
