"""
The leave-one-out token control variate: less noise from the choice of tokens, at no forward.

With f_ki = log p(y_i | y with m_k hidden), weights w_k and inclusion probabilities pi_k = P(i in m_k | level), a scheme
estimates the ELBO by  sum_k w_k sum_{i in m_k} f_ki.  Some tokens are hard, some are easy, and a draw that happens to
hide the hard ones comes out low. So what is expected of the hidden tokens is taken off, and its mean put back:

    ELBO  ~  sum_k w_k [ sum_{i in m_k} f_ki  -  kappa * sum_i (1{i in m_k} - pi_k) * c_ki ]

    c_ki  =  (sum_{k'} g_kk' 1{i in m_k'} f_k'i + ridge * mean_k) / (sum_{k'} g_kk' 1{i in m_k'} + ridge)

where k' runs over the draws of *other units*, g_kk' = exp(-(pi_k - pi_k')^2 / (2 bandwidth^2)), and mean_k is the
average of all these f under the same g. Once the levels are known the masks of other units say nothing about m_k, so
1{i in m_k} - pi_k has mean zero beside c_ki, and the estimate stays exactly unbiased for any kappa, bandwidth and ridge
that do not depend on the present masks.

c is linear in f. What draw k takes off can therefore be ordered by the f that it stands in:

    w_k sum_i (1{i in m_k} - pi_k) c_ki  =  sum_{k'} g_kk' sum_{i in m_k'} q_ki f_k'i

with charges q that depend on masks only. So all of it is a change of weights: f_k'i has  w_k' - kappa sum_k g_kk' q_ki.

The idea is the difference estimator of survey sampling; tests/test_draws.py holds its weights to the law.
"""

import math
from dataclasses import dataclass, replace

import torch

from .levels import is_long

LARGEST_KAPPA = 2
# Fewer tokens, as blocks of block diffusion have: each is hidden in most draws, so its own guess is soon the better
TINY = 8
# Of responses, or of blocks, that are tiny or long, and of those between: see docs/choosing-an-estimator.md
_BANDWIDTHS, _RIDGES = (0.5, 0.25), (0.3, 1.0)
_NOTHING = 1e-200  # witnesses whose inverse would leave the range of float64


@dataclass(frozen=True)
class ControlVariate:
    """
    Settings of the leave-one-out token control variate.

    Args:
        kappa: how much of what is expected of the hidden tokens is taken off. 0 is none; more than 1 makes up for a
            large ridge.
        bandwidth: how near in mask level another draw has to be to count as a witness; levels lie in (0, 1]. None is
            0.25 for responses, and for blocks of block diffusion, of 8 to 29 tokens, and 0.5 for others.
        ridge: how many witnesses the average token weighs as much as, in the guess of a single token. None is 1 where
            the bandwidth is 0.25, and 0.3 for others.
        long_kappa: the kappa of responses, and of blocks, of 30 tokens and more. None is that of the others.
    """

    kappa: float = 1.0
    bandwidth: float | None = None
    ridge: float | None = None
    long_kappa: float | None = None

    def __post_init__(self) -> None:
        for name in ("kappa", "long_kappa"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= LARGEST_KAPPA:
                raise ValueError(f"`{name}` must be between 0 and {LARGEST_KAPPA}, got {value}.")
        for name in ("bandwidth", "ridge"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"`{name}` must be positive and finite, or None, got {value}.")

    @property
    def learnt_kappa(self) -> float:
        """What a trainer may learn: the kappa of long responses where they have their own, else that of all."""
        return self.kappa if self.long_kappa is None else self.long_kappa

    def with_learnt_kappa(self, value: float) -> "ControlVariate":
        """Another value of it."""
        return replace(self, **{"kappa" if self.long_kappa is None else "long_kappa": value})

    def has_learnt_kappa(self, num_maskable: torch.Tensor) -> torch.Tensor:
        """`(B,)` bool, whether it is that of responses of L' `(B,)` tokens."""
        return is_long(num_maskable) | (self.long_kappa is None)

    def kappas(self, num_maskable: torch.Tensor) -> torch.Tensor:
        """`(B,)` float64, of responses, or blocks, of L' `(B,)` tokens."""
        share = self.has_learnt_kappa(num_maskable).double()
        return share * self.learnt_kappa + (1 - share) * self.kappa

    def widths(self, num_maskable: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Bandwidth and ridge `(B,)` float64 of responses, or blocks, of L' `(B,)` tokens."""
        wide = is_long(num_maskable) | (num_maskable < TINY)

        def choose(value: float | None, wide_one: float, narrow_one: float) -> torch.Tensor:
            values = (wide_one, narrow_one) if value is None else (value, value)
            return torch.where(wide, *values).double()

        return choose(self.bandwidth, *_BANDWIDTHS), choose(self.ridge, *_RIDGES)


def named_control_variate(value: ControlVariate | str | None) -> ControlVariate | None:
    """
    Settings by the names that the configurations have for them: `"none"` and `"leave_one_out"`.

    Raises:
        ValueError: another name, or `"adaptive"`, whose kappa comes from the steps of a training.
    """
    if value is None or isinstance(value, ControlVariate):
        return value
    if value in ("none", "leave_one_out"):
        return None if value == "none" else ControlVariate()
    if value == "adaptive":
        raise ValueError(
            "`control_variate='adaptive'` learns its kappa from the steps of a training, so only a trainer has it. "
            "Give 'leave_one_out', or a kappa of your own: `ControlVariate(kappa=...)`."
        )
    raise ValueError(f"`control_variate` must be 'none', 'leave_one_out' or a `ControlVariate`, got {value!r}.")


@dataclass(frozen=True)
class Control:
    """
    [`ControlVariate`] for given masks.

    Args:
        settings: kappa, bandwidth and ridge.
        masked: `(K, B, L)` bool.
        maskable: `(B, L)` bool.
        scale: `(K, B)` float64, w_k: the weight of a draw, the 1/K included.
        inclusion: `(K, B)` float64, pi_k.
        draws_per_unit: draws 0..S-1 are one unit, the next S another.
    """

    settings: ControlVariate
    masked: torch.Tensor
    maskable: torch.Tensor
    scale: torch.Tensor
    inclusion: torch.Tensor
    draws_per_unit: int

    def weight(self) -> torch.Tensor:
        """`(K, B, L)` float64: the weight of each f_ki, all terms that it stands in collected."""
        near, charge = self._nearness_and_charge()
        kappa = self.settings.kappas(self.maskable.sum(-1)).unsqueeze(-1)
        taken_off = kappa * torch.einsum("jkb,jbl->kbl", near, charge)
        return (self.scale.unsqueeze(-1) - taken_off) * self.masked

    def samples(self, log_probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The estimate of each draw, and what the kappa that may be learnt was multiplied with in it: w_k
        `sum_i (1{i in m_k} - pi_k) c_ki`, or zero for a response with another kappa.

        Args:
            log_probs: `(K, B, L)`, zero where not masked.

        Returns:
            Two tensors `(K, B)` in nats, times K: the estimate of the response is the mean of the first.
        """
        near, charge = self._nearness_and_charge()
        values = log_probs.double()
        control = (charge * torch.einsum("jkb,kbl->jbl", near, values)).sum(-1)
        num_maskable = self.maskable.sum(-1)
        estimate = self.scale * values.sum(-1) - self.settings.kappas(num_maskable) * control
        return len(values) * estimate, len(values) * control * self.settings.has_learnt_kappa(num_maskable)

    def _nearness_and_charge(self) -> tuple[torch.Tensor, torch.Tensor]:
        """G `(K, K, B)`, zero inside a unit, and q `(K, B, L)`."""
        masked = self.masked.double()
        bandwidth, ridge = self.settings.widths(self.maskable.sum(-1))
        distance = self.inclusion.unsqueeze(1) - self.inclusion.unsqueeze(0)
        unit = torch.arange(len(masked), device=masked.device) // self.draws_per_unit
        other = (unit.unsqueeze(1) != unit.unsqueeze(0)).unsqueeze(-1)
        near = torch.exp(-0.5 * (distance / bandwidth) ** 2) * other
        witnesses = torch.einsum("jkb,kbl->jbl", near, masked)  # how often other units saw a token
        seen = torch.einsum("jkb,kb->jb", near, masked.sum(-1))  # how many tokens they saw
        surprise = (masked - self.inclusion.unsqueeze(-1)) * self.maskable
        of_token = self.scale.unsqueeze(-1) * surprise / (witnesses + ridge.unsqueeze(-1))
        of_mean = torch.where(seen > _NOTHING, ridge * of_token.sum(-1) / seen, 0.0)
        return near, of_token + of_mean.unsqueeze(-1)
