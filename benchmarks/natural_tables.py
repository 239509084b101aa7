"""
One pair of responses under mirror pairs of every level, scored once: any law of levels, any control variate and any K
can be tried on it afterwards, with no forward.

The level of the sparser mask of a mirror pair lies in (0, 1/2]. It is cut into bins, the first of which hold one count
of hidden tokens each and the others a range that is at most two fifths of the level wide, with R mirror pairs (*units*)
each, drawn independently and uniformly within the bin. A law of levels is here what it gives to each bin; an estimate
with K draws takes K / 2 units of bins that the law chose and weighs them for it, so that its law is exact.

Two estimates are made at a time, of units that are all different. They are independent, so that half the square of
their difference is an unbiased estimate of the variance, in which all units stand: a mean over many such twins is far
less noisy than the variance of estimates that share none.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from trl_diffusion.estimators.control_variate import Control, ControlVariate
from trl_diffusion.estimators.levels import importance
from trl_diffusion.estimators.schemes import SCHEMES

RATIO = 1.4  # of the counts at the ends of a bin
UNITS = 3  # of a bin


@dataclass(frozen=True)
class Table:
    """
    The units of one response of T tokens, G bins of R units.

    Args:
        edges: `(G + 1,)` float64, of the bins.
        masked: `(G, R, 2, T)` bool, the two masks of each unit.
        values: by name, `(G, R, 2, T)` nats of the hidden tokens, zero elsewhere.
    """

    edges: torch.Tensor
    masked: torch.Tensor
    values: dict[str, torch.Tensor]


def make_bins(length: int) -> torch.Tensor:
    """`(G + 1,)` float64 edges of levels, from 0 to 1/2, for a response of `length` tokens."""
    counts = [0.0, min(1, length / 2)]
    while counts[-1] < length / 2:
        counts.append(min(max(counts[-1] + 1, int(RATIO * counts[-1])), length / 2))
    return torch.tensor(counts, dtype=torch.float64) / length


def draw_units(responses: list[list[int]], generator: torch.Generator) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """
    Bins, and the masks `(G, R, 2, T)` of two responses: with the same levels, and one fate of a token that both have at
    a place.
    """
    lengths = torch.tensor([len(response) for response in responses])
    edges = make_bins(int(lengths.max()))
    within = torch.rand(len(edges) - 1, UNITS, generator=generator, dtype=torch.float64)
    level = (edges[:-1, None] + within * edges.diff()[:, None]).flatten()
    noise = torch.randint(2**62, (len(level), 2, int(lengths.max())), generator=generator)
    for place, tokens in enumerate(zip(*responses, strict=False)):
        if tokens[0] == tokens[1]:
            noise[:, 1, place] = noise[:, 0, place]
    maskable = torch.arange(noise.shape[-1]) < lengths.unsqueeze(1)
    masked = SCHEMES["mirror"].make(level.unsqueeze(1).expand(-1, 2), noise, maskable, 1.0)[0]
    shape = (len(edges) - 1, UNITS, 2, -1)
    return edges, [masked[:, :, b, :length].unflatten(0, shape[:2]) for b, length in enumerate(lengths.tolist())]


def masses(edges: torch.Tensor, length: int, a: float | None) -> torch.Tensor:
    """`(G,)` float64: the share of each bin under Beta(a, a), as [`draw_masks`] has it for `length` tokens."""
    likely = 1 / (length * importance(torch.arange(1, length + 1), length, a))
    passed = torch.cat([torch.zeros(1, dtype=torch.float64), likely.cumsum(0)])
    place = edges * length
    low = place.long().clamp(max=length - 1)
    shares = passed[low] + (place - low) * likely[low]
    return 2 * shares.diff()


def elbo(table: Table, name: str) -> float:
    """Estimate of the sum over tokens, in nats, from all units."""
    return _samples(table, name).mean((1, 2)).dot(2 * table.edges.diff()).item()


def _samples(table: Table, name: str) -> torch.Tensor:
    """`(G, R, 2)` float64, the estimate (L'/l) S(m) of each draw alone."""
    return table.values[name].double().sum(-1) * table.masked.shape[-1] / table.masked.sum(-1)


def paper_variance(table: Table, name: str) -> float:
    """Variance of one fixed-count draw with a uniform level, VRPO's eq. 14. Means over the bins are independent."""
    samples = _samples(table, name)
    share = 2 * table.edges.diff()
    mean = share @ samples.mean(2)  # (R,)
    square_of_mean = mean.mean().square() - mean.var() / len(mean)
    return (share @ samples.square().mean((1, 2)) - square_of_mean).item()


def pick(
    table: Table, mass: torch.Tensor, draws: int, twins: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Bins and units of `twins` times two estimates from `draws` stratified draws: `(K / 2, 2, twins)` each.

    Twins in which a bin comes more often than it has units are left out; they are few.
    """
    size = draws // 2
    start = torch.rand(1, 2, twins, generator=generator, dtype=torch.float64)
    share = (start + torch.arange(size).view(-1, 1, 1) / size).frac()
    ends = mass.cumsum(0)
    bins = torch.searchsorted(ends, 2 * torch.minimum(share, 1 - share) * ends[-1]).clamp(max=len(mass) - 1)
    flat = bins.flatten(0, 1)
    same = flat.unsqueeze(1) == flat.unsqueeze(0)  # (K, K, twins)
    before = (same & torch.ones(draws, draws, dtype=torch.bool).tril(-1).unsqueeze(-1)).sum(1)
    there = table.masked.shape[1]
    first = torch.randint(there, (twins, len(mass)), generator=generator)
    units = (first.gather(1, flat.T).T + before) % there
    enough = (before < there).all(0)
    return bins[..., enough], units.view_as(bins)[..., enough]


def estimates(
    table: Table, mass: torch.Tensor, picked: tuple[torch.Tensor, torch.Tensor], control: ControlVariate
) -> dict[str, torch.Tensor]:
    """
    By name, `(2, 2, twins)` nats: the parts b and h of the estimates b - kappa h of all twins; at K = 2 h is zero.
    """
    bins, units = (x.flatten(1) for x in picked)  # (K / 2, 2 twins)
    masked = table.masked[bins, units].transpose(1, 2).flatten(0, 1)  # (K, 2 twins, T)
    inclusion = masked.sum(-1).double() / masked.shape[-1]
    weighed = (2 * table.edges.diff() / mass)[bins].repeat_interleave(2, 0)
    scale = weighed / (inclusion * len(masked))
    weight = torch.stack([scale.unsqueeze(-1) * masked, torch.zeros(masked.shape, dtype=torch.float64)])
    if len(masked) > 2:  # a single pair has no witnesses
        everything = torch.ones_like(masked[0])
        with_control = Control(control, masked, everything, scale, inclusion, 2).weight()
        weight[1] = (weight[0] - with_control) / control.kappa
    return {
        name: torch.einsum("pkrt,krt->pr", weight, values[bins, units].transpose(1, 2).flatten(0, 1).double()).view(
            2, 2, -1
        )
        for name, values in table.values.items()
    }


def moments(parts: torch.Tensor) -> list[float]:
    """Variances of b and h, and between them their covariance, of `(2, 2, twins)`."""
    apart = parts[:, 0] - parts[:, 1]
    products = apart @ apart.T / (2 * apart.shape[1])
    return [products[0, 0].item(), products[0, 1].item(), products[1, 1].item()]


def variance(found: list[float], kappa: float) -> float:
    """Of b - kappa h, from [`moments`]."""
    return found[0] - 2 * kappa * found[1] + kappa**2 * found[2]


Scorer = Callable[[list[int], torch.Tensor], dict[str, torch.Tensor]]


def score_pair(responses: list[list[int]], score: Scorer, generator: torch.Generator) -> list[Table]:
    """Tables of both responses; `score` maps a response and masks `(N, T)` to named values `(N, T)`."""
    edges, masks = draw_units(responses, generator)
    tables = []
    for response, masked in zip(responses, masks, strict=True):
        values = score(response, masked.flatten(0, 2))
        tables.append(Table(edges, masked, {name: x.view(masked.shape) for name, x in values.items()}))
    return tables
