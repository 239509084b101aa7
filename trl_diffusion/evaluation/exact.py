"""Masks of likelihoods that have no error, as draws: those of the chain rule, and all there are."""

import math

import torch

from ..estimators.draws import MaskDraws

ORDERS = ("left_to_right", "right_to_left", "random")


def chain_rule(
    maskable: torch.Tensor,
    order: str = "left_to_right",
    seed: int = 0,
    nonce: int = 0,
    blocks: torch.Tensor | None = None,
) -> MaskDraws:
    """
    The masks of the chain rule for one row, as draws: in the j-th the tokens from the j-th on are hidden, and the first
    of these has the weight 1. Under a block diffusion model that is so in each of its blocks, all of them at once.

    Args:
        maskable: `(1, L)` bool, the tokens that are scored.
        order: one of [`ORDERS`].
        seed, nonce: of a random order.
        blocks: `(1, L)` int64, of a block diffusion model the number of each token's block.
    """
    places = maskable[0].nonzero().squeeze(1)
    if order == "right_to_left":
        places = places.flip(0)
    if order == "random":
        generator = torch.Generator().manual_seed((seed * 1_000_003 + nonce) % 2**63)
        places = places[torch.randperm(len(places), generator=generator).to(places.device)]
    number = torch.zeros_like(places) if blocks is None else blocks[0, places]
    together = number.unsqueeze(1) == number  # (N, N)
    rank = torch.full_like(maskable[0], -1, dtype=torch.long)
    rank[places] = together.tril(-1).sum(1)  # how many of its block come before it
    steps = torch.arange(int(rank.max()) + 1, device=places.device).unsqueeze(1)
    return MaskDraws((rank >= steps)[:, None], (rank == steps).float()[:, None])


def every_mask(maskable: torch.Tensor) -> MaskDraws:
    """
    Every mask of one row once, as draws: one that hides l of N tokens has the weight 1 / (l * C(N, l)), so that the sum
    is the ELBO itself.

    Args:
        maskable: `(1, L)` bool, the few tokens that are scored.
    """
    places = maskable[0].nonzero().squeeze(1)
    number = len(places)
    codes = torch.arange(1, 2**number, device=places.device).unsqueeze(1)
    hidden = (codes >> torch.arange(number, device=places.device)) % 2 == 1  # (2^N - 1, N)
    weights = torch.tensor([1 / (size * math.comb(number, size)) for size in hidden.sum(1).tolist()])
    masked = maskable.new_zeros(len(hidden), 1, maskable.shape[1])
    masked[:, 0, places] = hidden
    return MaskDraws(masked, masked * weights.to(places.device)[:, None, None])
