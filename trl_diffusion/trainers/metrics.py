"""
How noisy the preference score of a step is: the `elbo/...` metrics.

VRPO (arXiv 2505.19223) bounds the bias and the variance of the loss and of its gradient by the variance of the score
estimate (Theorems 1 and 4), so that is the number to watch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from ..estimators.elbo import ELBO, sum_units, variance_of_mean
from ..scoring.head import ELBOHeadOutput

# TRL's statistics of full logits and of next-token predictions, neither of which exists here
MEANINGLESS_METRICS = ("entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected")


@dataclass
class ScoreDiagnostics:
    """
    Collects what the ELBO head answers while a loss is computed.

    Args:
        beta: scale of the score.
    """

    beta: float
    _collected: list[ELBOHeadOutput] | None = field(default=None, repr=False)

    @contextmanager
    def collecting(self) -> Iterator[list[ELBOHeadOutput]]:
        """Keep the outputs of the requests made inside the block."""
        collected: list[ELBOHeadOutput] = []
        self._collected = collected
        try:
            yield collected
        finally:
            self._collected = None

    def observe(self, output: ELBOHeadOutput) -> None:
        """Called by the head for every request."""
        if self._collected is not None:
            self._collected.append(output)

    def of_pairs(self, outputs: list[ELBOHeadOutput]) -> dict[str, torch.Tensor]:
        """
        Diagnostics per pair of a batch [chosen, rejected], see [`ScoreDiagnostics.of_rows`].

        The score is s = beta * [(B_w - B_w,ref) - (B_l - B_l,ref)].
        """
        metrics = _mask_ratio(outputs)
        if len(outputs) == 2:
            scores = _difference_of_halves(self._scores(outputs, "samples"))
            metrics["elbo/saturation"] = saturation(scores.mean(0))
            metrics |= _spread(scores, _elbo(outputs).draws_per_unit)
        return metrics

    def of_rows(self, outputs: list[ELBOHeadOutput]) -> dict[str, torch.Tensor]:
        """
        Diagnostics per row of a batch, whose score is s = beta * (B - B_ref), up to a baseline.

        Args:
            outputs: of the policy and of the reference, in any order, since no sign matters here; or of the policy
                alone where the reference was precomputed, which leaves the mask ratio only.

        Returns:
            Tensors `(rows,)`: `elbo/mask_ratio`; `elbo/score_variance`, of the mean over draws, and
            `elbo/score_standard_error`, its root. With one draw, or one mirror pair, the last two are not there.
        """
        metrics = _mask_ratio(outputs)
        if len(outputs) == 2:
            metrics |= _spread(self._scores(outputs, "samples"), _elbo(outputs).draws_per_unit)
        return metrics

    def kappa_moments(self, outputs: list[ELBOHeadOutput], pairs: bool) -> torch.Tensor:
        """
        Sums over a batch that a kappa is learnt from, see [`RunningKappa`].

        The control of a unit of draws has mean zero whatever the others are. So Cov(b, h) is the sum over units of
        E[b_u h_u], and from b_u what the other units say of it may be taken off, which spares the noise of its mean.

        Args:
            outputs: of the policy and of the reference, in any order.
            pairs: whether the batch is [chosen, rejected], whose difference is the score.

        Returns:
            `(3,)` float64: of b h, of h^2, and the number of estimates that have an h; zeros for a single unit.
        """
        elbo = _elbo(outputs)
        control = self._scores(outputs, "control")
        plain = self._scores(outputs, "samples") + elbo.kappa * control
        if pairs:
            plain, control = _difference_of_halves(plain), _difference_of_halves(control)
        num_mc_samples, size = len(plain), elbo.draws_per_unit
        if num_mc_samples <= size:
            return torch.zeros(3, dtype=torch.float64, device=plain.device)
        b, h = (sum_units(part.double(), size) / num_mc_samples for part in (plain, control))
        drawn = sum_units(torch.ones_like(b[:1]).expand(num_mc_samples, -1), size)
        others = (b.sum(0) - b) / (num_mc_samples - drawn) * drawn
        product, square = ((b - others) * h).sum(), h.sum(0).square().sum()
        return torch.stack([product, square, h.any(0).sum()])

    def _scores(self, outputs: list[ELBOHeadOutput], part: str) -> torch.Tensor:
        """`(K, B)`: beta times the difference of the two outputs' `samples` or `control`."""
        first, second = (getattr(output.elbo, part) for output in outputs)
        return self.beta * (first - second)


def saturation(score: torch.Tensor) -> torch.Tensor:
    """1 - 4 sigma(s) sigma(-s): 0 where the gradient of a sigmoid loss answers to s, 1 where it no longer does."""
    return 1 - 4 * torch.sigmoid(score) * torch.sigmoid(-score)


def _mask_ratio(outputs: list[ELBOHeadOutput]) -> dict[str, torch.Tensor]:
    return {"elbo/mask_ratio": torch.stack([o.mask_ratio for o in outputs if o.mask_ratio is not None]).mean(0)}


def _difference_of_halves(samples: torch.Tensor) -> torch.Tensor:
    """`(K, pairs)` chosen minus rejected, draw by draw: what noise the two share is not in it."""
    chosen, rejected = samples.chunk(2, dim=1)
    return chosen - rejected


def _elbo(outputs: list[ELBOHeadOutput]) -> ELBO:
    elbo = outputs[0].elbo
    assert elbo is not None
    return elbo


def _spread(samples: torch.Tensor, draws_per_unit: int) -> dict[str, torch.Tensor]:
    """Variance and standard error of the mean of `samples` `(K, rows)` over draws; nothing for a single unit."""
    if samples.shape[0] <= draws_per_unit:
        return {}
    variance = variance_of_mean(samples, draws_per_unit)
    return {"elbo/score_variance": variance, "elbo/score_standard_error": variance.sqrt()}
