"""
Baselines of ELBO-KTO: what a response's log-ratio is compared with.

With r_i = B_policy - B_reference on shared draws, a KTO loss is a function of s_i = beta (r_i - z_i) (ELBO-KTO, arXiv
2510.23658). The baseline z_i carries no gradient. The paper takes the mean of r over the global micro-batch, which
needs no further forward; KTO's own (arXiv 2402.01306) is the mean over mismatched pairs, clamped at zero.

In evaluation the whole evaluation set stands in the place of the global micro-batch, so that what is reported is a
function of the model and the set, and not of how the set was cut into batches.

This module knows nothing of models or processes: it maps totals over the global micro-batch to baselines.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

# Order of the totals: desirable first, as TRL lists chosen before rejected
DESIRABLE, UNDESIRABLE = 0, 1


@dataclass(frozen=True)
class Totals:
    """
    Of the global micro-batch, by class.

    Args:
        total: `(2,)` float64, sum of r.
        count: `(2,)` float64, number of rows.
        mismatched: `()` float64, sum of r over mismatched pairs, one for each row; None where there are none.
    """

    total: torch.Tensor
    count: torch.Tensor
    mismatched: torch.Tensor | None = None

    @classmethod
    def of(cls, log_ratios: torch.Tensor, desirable: torch.Tensor, mismatched: torch.Tensor | None = None) -> "Totals":
        """Totals of log-ratios `(B,)` nats, `desirable` `(B,)` bool, and log-ratios of mismatched pairs `(B,)`."""
        classes = torch.stack([desirable, ~desirable]).double()
        return cls(
            total=classes @ log_ratios.detach().double(),
            count=classes.sum(1),
            mismatched=None if mismatched is None else mismatched.detach().double().sum(),
        )

    @property
    def mean(self) -> torch.Tensor:
        """`()` mean of r over the global micro-batch."""
        return self.total.sum() / self.count.sum()


@dataclass
class RunningMeans:
    """
    Exponential moving averages of r over past global micro-batches, for both classes together and for each.

    Args:
        decay: weight of the past, in [0, 1).
        overall: mean over both classes. Zero before the first batch, where policy and reference are the same.
        by_class: means of the desirable and the undesirable rows.
    """

    decay: float
    overall: float = 0.0
    by_class: list[float] = field(default_factory=lambda: [0.0, 0.0])

    def update(self, totals: Totals) -> None:
        """Take in a batch; a class without rows keeps its mean."""
        self.overall += (1 - self.decay) * (totals.mean.item() - self.overall)
        for label, (total, count) in enumerate(zip(totals.total.tolist(), totals.count.tolist(), strict=True)):
            if count:
                self.by_class[label] += (1 - self.decay) * (total / count - self.by_class[label])


def _none(log_ratios, desirable, totals, running):
    """z_i = 0."""
    return torch.zeros_like(log_ratios)


def _batch_mean(log_ratios, desirable, totals, running):
    """z_i = mean of r over the global micro-batch (the paper's); zero for a row alone, whose own r it would be."""
    mean = totals.mean if totals.count.sum() > 1 else torch.zeros_like(totals.mean)
    return mean.to(log_ratios).expand_as(log_ratios)


def _leave_one_out(log_ratios, desirable, totals, running):
    """z_i = mean of r over the other rows, so that r_i - z_i = n/(n-1) (r_i - mean r): independent of row i's draws."""
    others = totals.total.sum() - log_ratios.double()
    return (others / (totals.count.sum() - 1).clamp(min=1)).to(log_ratios)


def _ema(log_ratios, desirable, totals, running):
    """z_i = running mean of r over past micro-batches."""
    return torch.full_like(log_ratios, running.overall)


def _ema_per_class(log_ratios, desirable, totals, running):
    """z_i = running mean of r over past rows of row i's class."""
    means = torch.tensor(running.by_class, dtype=log_ratios.dtype, device=log_ratios.device)
    return torch.where(desirable, means[DESIRABLE], means[UNDESIRABLE])


def _kl(log_ratios, desirable, totals, running):
    """z_i = mean of r over mismatched pairs, and no less than zero (KTO, arXiv 2402.01306, eq. 7)."""
    return (totals.mismatched / totals.count.sum()).clamp(min=0).to(log_ratios).expand_as(log_ratios)


Baseline = Callable[[torch.Tensor, torch.Tensor, Totals, RunningMeans], torch.Tensor]

# A baseline maps detached log-ratios (B,), desirable (B,) bool, totals of the global micro-batch and running means to
# z (B,).
BASELINES: dict[str, Baseline] = {
    "batch_mean": _batch_mean,
    "leave_one_out": _leave_one_out,
    "ema": _ema,
    "ema_per_class": _ema_per_class,
    "kl": _kl,
    "none": _none,
}
# These compare a row with the batch that it is in, and are empty for a batch of one
NEED_A_BATCH = ("batch_mean", "leave_one_out")
