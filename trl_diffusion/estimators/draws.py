"""
Mask draws: which tokens of a response are hidden, and with which weight their log-probabilities count.

Notation (VRPO, arXiv 2505.19223, eqs. 12-15). A row has L' maskable tokens. A mask level t in (0, 1], t = 1 all masked,
or a count l in {1..L'}, says how much is hidden. With m the set of hidden tokens and

    S(m) = sum of log p(y_i | y with m hidden), i in m,

the ELBO of the response is   sum over non-empty m of  S(m) / (|m| * C(L', |m|)).

The law of a masking scheme. K draws with masks m_k and weights w_k estimate the ELBO by  sum_k sum_{i in m_k} w_k,i
log p(y_i | ...). That is unbiased *whatever the model* if and only if for every non-empty m and every i in m

    E[ sum_k w_k,i * 1{m_k = m} ]  =  1 / (|m| * C(L', |m|)).

Randomness is a value here: a draw is a pure function of (seed, nonce, row content, draw index), by a counter-based hash
(`hashing.py`) with no generator state. So the policy and its reference meet the same masks, and neither padding nor
batch mates, accumulation, world size, device or resuming change a row's draws.

For a block diffusion model all of this holds for each block of a row by itself, and so for their sum (`cells.py`).

This module knows nothing of models.
"""

from dataclasses import astuple, dataclass

import torch

from .cells import Cells, find_cells
from .control_variate import Control, ControlVariate, named_control_variate
from .hashing import hash_rows, mix, mix_int, uniform
from .schemes import SCHEMES, check_levels

# Part of the key under which reference values are stored: change it whenever the same arguments give other draws.
DRAW_VERSION = 5
_LEVEL, _TOKEN = 1, 2  # separate the streams of a row


@dataclass(frozen=True, repr=False)
class MaskDraws:
    """
    K draws of masks for B rows of length L.

    Args:
        masked: `(K, B, L)` bool, the hidden positions.
        weight: `(K, B, L)` float, the factor of each hidden position's log-probability; zero elsewhere. The 1/K of the
            average over draws is part of it.
        draws_per_unit: that many draws in a row depend on each other; units of them are independent, given the levels.
        control: how `weight` came about, where a control variate is part of it.
        cells: what was drawn for independently, of which `control` knows; rows without it.
    """

    masked: torch.Tensor
    weight: torch.Tensor
    draws_per_unit: int = 1
    control: Control | None = None
    cells: Cells | None = None

    def __post_init__(self) -> None:
        if self.masked.dim() != 3 or self.masked.dtype != torch.bool or self.masked.shape != self.weight.shape:
            raise ValueError(
                "`masked` must be a (K, B, L) bool tensor and `weight` have its shape, got "
                f"{self.masked.dtype} {tuple(self.masked.shape)} and {tuple(self.weight.shape)}."
            )

    def __repr__(self) -> str:
        draws, rows, length = self.masked.shape
        control = f", {self.control.settings}" if self.control else ""
        return f"MaskDraws({draws} draws of {rows} rows of {length} tokens, {self.draws_per_unit} per unit{control})"

    @property
    def num_mc_samples(self) -> int:
        """K, the number of draws."""
        return self.masked.shape[0]

    def samples(self, log_probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        The estimate of each draw alone, `(K, B)` nats; the mean over K is the sum of weight times log-probability.

        Args:
            log_probs: `(K, B, L)`, zero where not masked.

        Returns:
            That, and what its `learnt_kappa` was multiplied with in it; none without a control variate.
        """
        if self.control is None:
            return (log_probs * self.weight).sum(-1) * self.num_mc_samples, None
        cells = self.cells or Cells(self.control.maskable)
        estimate, control = self.control.samples(cells.gather(log_probs))
        return cells.add_up(estimate).to(log_probs.dtype), cells.add_up(control).to(log_probs.dtype)


@dataclass(frozen=True)
class MaskSampler:
    """
    The arguments of [`draw_masks`] that stay the same through a run.

    Args:
        num_mc_samples: K, draws per row.
        scheme: name of the masking scheme, one of [`SCHEMES`].
        stratify: whether the levels of a row are spread evenly.
        seed: of all draws.
        control_variate: settings of the leave-one-out token control variate, or their name, see [`draw_masks`].
        couple_pairs: whether responses to one prompt share levels and the fate of equal tokens.
        level_concentration: a of the law Beta(a, a) of the levels; None goes by the length of a response.
    """

    num_mc_samples: int = 8
    scheme: str = "fixed_count"
    stratify: bool = False
    seed: int = 0
    control_variate: ControlVariate | str | None = None
    couple_pairs: bool = False
    level_concentration: float | None = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "control_variate", named_control_variate(self.control_variate))

    def __call__(
        self,
        maskable: torch.Tensor,
        rows: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        nonce: int = 0,
        kappa: float | None = None,
        blocks: torch.Tensor | None = None,
    ) -> MaskDraws:
        """Draw masks for a batch, see [`draw_masks`]; `kappa` takes the place of the one that may be learnt."""
        settings = named_control_variate(self.control_variate)
        if settings is not None and kappa is not None:
            settings = settings.with_learnt_kappa(kappa)
        return draw_masks(
            maskable,
            num_mc_samples=self.num_mc_samples,
            scheme=self.scheme,
            stratify=self.stratify,
            seed=self.seed,
            rows=rows,
            attention_mask=attention_mask,
            nonce=nonce,
            control_variate=settings,
            couple_pairs=self.couple_pairs,
            level_concentration=self.level_concentration,
            blocks=blocks,
        )

    @property
    def key(self) -> tuple[object, ...]:
        """Two samplers with equal keys give equal draws: what is stored of one is valid for the other."""
        return (DRAW_VERSION, *astuple(self))


def draw_masks(
    maskable: torch.Tensor,
    num_mc_samples: int = 8,
    scheme: str = "fixed_count",
    stratify: bool = False,
    seed: int = 0,
    rows: torch.Tensor | None = None,
    *,
    attention_mask: torch.Tensor | None = None,
    nonce: int = 0,
    control_variate: ControlVariate | str | None = None,
    couple_pairs: bool = False,
    level_concentration: float | None = 1.0,
    blocks: torch.Tensor | None = None,
) -> MaskDraws:
    """
    Draw K masks for each row.

    Args:
        maskable: `(B, L)` bool, the tokens that may be masked: those of the response.
        num_mc_samples: K >= 1, draws per row.
        scheme: `"bernoulli"` (VRPO eq. 12: t ~ U(0,1], each token hidden with probability t, weight 1/t),
            `"fixed_count"` (eq. 14: l ~ U{1..L'}, exactly l tokens hidden, weight L'/l; same mean, less variance) or
            `"mirror"` (pairs of such masks, the second of which hides what the first shows; less again).
        stratify: spread the levels of a row evenly, from one random start, instead of drawing them independently. Each
            level keeps its distribution, so the mean is the same.
        seed: of all draws.
        rows: `(B, L)` token ids, whose content names the row. Without them the row's index does.
        attention_mask: `(B, L)`, one at real tokens, so that padding is not part of a row's content.
        nonce: another number gives other draws of the same rows; the training step, say.
        control_variate: settings of the leave-one-out token control variate, `"leave_one_out"` for the default ones,
            or `"none"`. The masks are the same, the weights not.
        couple_pairs: let responses to one prompt share their levels, and equal tokens at equal places their fate. Each
            response's draws keep their distribution; the noise that two responses share leaves their difference.
        level_concentration: levels are drawn from Beta(a, a) with this a in (0, 1], and weighed for it, so that the
            mean is the same. 1 is uniform. Below it the ends of (0, 1) come more often and weigh less, which for long
            responses is quieter; 0.5 is the arcsine law. None goes by the length of a response: 1 below thirty tokens,
            0.9 there, and 0.05 less for each doubling, to 0.75. For schemes that draw a count.
        blocks: `(B, L)` int64, of a block diffusion model the number of each token's block, going up. Each block is
            then drawn for as a row of its own is, and one draw hides something of all of them.

    Returns:
        [`MaskDraws`] on the device of `maskable`.

    Raises:
        ValueError: unknown scheme or control variate, K < 1, `couple_pairs` without `rows`, no such law of levels or
            none that the scheme has, shapes that differ, blocks out of order, or a row in which nothing is maskable.
    """
    check_shapes(maskable, rows=rows, attention_mask=attention_mask, blocks=blocks)
    settings = named_control_variate(control_variate)
    check_levels(scheme, level_concentration)
    if num_mc_samples < 1:
        raise ValueError(f"`num_mc_samples` must be at least 1, got {num_mc_samples}.")
    if couple_pairs and rows is None:
        raise ValueError("`couple_pairs=True` compares the content of rows: pass `rows`, the token ids.")
    maskable = maskable.bool()
    _refuse_empty(maskable)

    cells, size = find_cells(maskable, blocks), SCHEMES[scheme].draws_per_unit
    key = mix(mix(_row_content(maskable, rows, attention_mask, couple_pairs) + mix_int(seed)) + mix_int(nonce))
    key = cells.keys(key)
    unit = torch.arange(-(-num_mc_samples // size), device=maskable.device).unsqueeze(1)  # (U, 1)
    share = _shares(key, unit, stratify)
    noise = mix(mix(mix(key + _TOKEN) + unit).unsqueeze(-1) + _token_content(cells, rows, couple_pairs))

    made = SCHEMES[scheme].make(share, noise, cells.maskable, level_concentration)
    masked, inclusion, importance = (x.flatten(0, 1)[:num_mc_samples] for x in made)  # (K, C, W), and (K, C) twice
    scale = importance / (inclusion.double() * num_mc_samples)
    if settings is None:
        return MaskDraws(cells.scatter(masked), cells.scatter((scale.unsqueeze(-1) * masked).float()), size)
    control = Control(settings, masked, cells.maskable, scale, inclusion.double(), size)
    return MaskDraws(cells.scatter(masked), cells.scatter(control.weight().float()), size, control, cells)


def _refuse_empty(maskable: torch.Tensor) -> None:
    some = maskable.any(-1)
    if not bool(some.all()):
        empty = (~some).nonzero().flatten().tolist()
        raise ValueError(f"Rows {empty} have no maskable token: the ELBO of an empty response is not defined.")


def check_shapes(maskable: torch.Tensor, **others: torch.Tensor | None) -> None:
    """Refuse a `maskable` that is not `(B, L)`, and others of another shape, which torch might broadcast."""
    if maskable.dim() != 2:
        raise ValueError(f"`maskable` must be (B, L), rows by positions, got {tuple(maskable.shape)}.")
    for name, other in others.items():
        if other is not None and other.shape != maskable.shape:
            raise ValueError(
                f"`{name}` is {tuple(other.shape)} and `maskable` {tuple(maskable.shape)}: both must be (B, L), for "
                "the same rows."
            )


def _shares(key: torch.Tensor, unit: torch.Tensor, stratify: bool) -> torch.Tensor:
    """`(U, B)` shares of the law of levels, each uniform on [0, 1); stratified: evenly spaced, from a random start."""
    key = mix(key + _LEVEL)
    if stratify:
        return (uniform(key) + unit / len(unit)).frac()
    return uniform(mix(key + unit))


def _row_content(maskable, rows, attention_mask, couple_pairs):
    """`(B,)` what names a row: its tokens and which of them may be masked; for coupled responses the prompt alone."""
    if rows is None:
        return mix(torch.arange(maskable.shape[0], device=maskable.device))
    real = torch.ones_like(maskable) if attention_mask is None else attention_mask.bool()
    if couple_pairs:
        return hash_rows(rows, real & ~maskable)
    return hash_rows(rows.long() * 2 + maskable, real)


def _token_content(cells, rows, couple_pairs):
    """`(C, W)` what names a token in its cell: its place among the maskable ones; for coupled responses itself too."""
    place = cells.maskable.long().cumsum(-1)
    return mix(place) + cells.gather(rows.long()) if couple_pairs else place
