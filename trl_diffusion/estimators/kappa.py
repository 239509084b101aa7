"""The kappa of the control variate, learnt from past steps."""

from dataclasses import dataclass

import torch

from .control_variate import LARGEST_KAPPA

# How many past estimates, and which weight of a step's past, the running kappa has
_PRIOR_COUNT = 64
_KAPPA_DECAY = 0.98


def kappa_of_others(covariance: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
    """
    `(P,)` in [0, 2]: for each of P pairs the kappa that would have been best for all the others together.

    It is what a run that has met the others would have learnt, and says nothing of the pair itself.

    Args:
        covariance, square: `(P,)` float64, Cov(b, h) and Var(h) of the estimates b - kappa h of each pair.
    """
    best = (covariance.sum() - covariance) / (square.sum() - square)
    return best.clamp(0, LARGEST_KAPPA)


def moments_of_kappa(variances: torch.Tensor, kappas: tuple[float, float, float]) -> torch.Tensor:
    """
    `(3, P)` Var(b), Cov(b, h) and Var(h) of each of P pairs, from the variances of its estimates b - kappa h,
    Var(b) - 2 kappa Cov(b, h) + kappa^2 Var(h), at three kappas. Where kappa changes nothing the last two are zero.

    Args:
        variances: `(P, 3)` float64.
        kappas: what they are at, evenly spaced.
    """
    first, middle, last = variances.unbind(1)
    low, high = kappas[0], kappas[2]
    square = 2 * (first - 2 * middle + last) / (high - low) ** 2
    covariance = ((high + low) * square - (last - first) / (high - low)) / 2
    return torch.stack([first + 2 * low * covariance - low**2 * square, covariance, square])


@dataclass
class RunningKappa:
    """
    The kappa that would have been best in past steps: Cov(b, h) / Var(h) of estimates b - kappa * h.

    It depends on past masks only, so the estimate stays unbiased. Moments are running sums that decay by step; h has
    mean zero, so that E[b h] is the covariance. The initial value counts for some tens of estimates.

    Args:
        initial: kappa before anything was seen.
        product, square: running sums of b h and of h^2.
        count: running number of estimates.
        pending: the same three of the step that is not over yet.
    """

    initial: float
    product: float = 0.0
    square: float = 0.0
    count: float = 0.0
    pending: tuple[float, float, float] = (0.0, 0.0, 0.0)

    @property
    def value(self) -> float:
        """Kappa, in [0, 2]."""
        if self.square == 0:
            return self.initial
        best = min(max(self.product / self.square, 0.0), LARGEST_KAPPA)
        return (_PRIOR_COUNT * self.initial + self.count * best) / (_PRIOR_COUNT + self.count)

    def observe(self, product: float, square: float, count: float) -> None:
        """Sums over the estimates of a micro-batch, of all processes."""
        self.pending = (self.pending[0] + product, self.pending[1] + square, self.pending[2] + count)

    def end_step(self) -> None:
        """Make what was observed part of the past."""
        product, square, count = self.pending
        self.product = _KAPPA_DECAY * self.product + product
        self.square = _KAPPA_DECAY * self.square + square
        self.count = _KAPPA_DECAY * self.count + count
        self.pending = (0.0, 0.0, 0.0)
