"""What [`diagnose_variance`](diagnose.py) reports: estimators side by side, and which one to take."""

import math
from dataclasses import dataclass, field
from typing import Any

DRAW_COUNTS = (2, 4, 8, 16)
ENOUGH_DRAWS = 64  # to tell the parts of the noise: with fewer, two draws of a level seldom hide the same token
# Estimators that are compared: options of the configuration
ESTIMATORS: dict[str, dict[str, Any]] = {
    "VRPO paper": {"mask_scheme": "fixed_count", "stratify": False, "control_variate": "none", "couple_pairs": False},
    "fixed counts": {"mask_scheme": "fixed_count", "stratify": True, "control_variate": "none", "couple_pairs": False},
    "mirror": {"mask_scheme": "mirror", "stratify": True, "control_variate": "none", "couple_pairs": False},
    "mirror, control": {
        "mask_scheme": "mirror", "stratify": True, "control_variate": "leave_one_out", "couple_pairs": False,
    },
    "mirror, coupled": {"mask_scheme": "mirror", "stratify": True, "control_variate": "none", "couple_pairs": True},
    "default": {"mask_scheme": "mirror", "stratify": True, "control_variate": None, "couple_pairs": True},
}  # fmt: skip


@dataclass(frozen=True)
class VarianceReport:
    """
    What [`diagnose_variance`] found. Scores are in units of the loss, `beta` included; variances are means over pairs.

    Args:
        num_pairs: pairs that were scored.
        num_draws: draws of each response.
        beta: of the score.
        compares_with_reference: false if the policy is its reference: then its log-probabilities stand in for the
            log-ratios, and only the proportions mean something.
        overlap: mean share of places at which chosen and rejected have the same token.
        margin: mean over pairs of the score, and `margin_spread` its standard deviation.
        parts: shares of `level`, `tokens` and `context` in the variance of a single fixed-count draw.
        variance: of the score, by estimator and K; `error` is the standard error over pairs.
        target_standard_error: of the score, see `recommended`.
        between_pairs: variance of the score over pairs, the noise of the masks taken off.
        level_concentration: of the law of levels that all estimators but the paper's have; None goes by the length.
    """

    num_pairs: int
    num_draws: int
    beta: float
    compares_with_reference: bool
    overlap: float
    margin: float
    margin_spread: float
    parts: dict[str, float]
    variance: dict[tuple[str, int], float]
    error: dict[tuple[str, int], float] = field(repr=False)
    target_standard_error: float = 0.5
    between_pairs: float = 0.0
    level_concentration: float | None = 1.0

    @property
    def recommended(self) -> tuple[str, int]:
        """
        Estimator and K: the quietest estimator, and the fewest draws with which its variance V(K) is small enough.

        It is if  V(K) <= max(target^2, S^2),  with S^2 the variance of the score between pairs. The mean over n pairs
        has the variance (S^2 + V(K)) / n: from V(K) = S^2 on, no number of draws halves it, and as many forwards on
        twice the pairs do. The target alone counts where pairs are alike.

        The default is left only for one whose variance is lower by more than the noise of the measurement.
        """
        largest = max(count for _, count in self.variance)
        # Fixed counts with levels by length are measured, but no option asks for them
        known = [name for name in ESTIMATORS if name != "fixed counts" or self.level_concentration is not None]
        name = min(known, key=lambda name: self.variance.get((name, largest), math.inf))
        noise = math.hypot(self.error["default", largest], self.error[name, largest])
        if self.variance["default", largest] <= self.variance[name, largest] + 2 * noise:
            name = "default"
        counts = sorted(count for estimator, count in self.variance if estimator == name)
        enough = [k for k in counts if self.variance[name, k] <= self._small_enough]
        return name, enough[0] if enough else counts[-1]

    @property
    def _small_enough(self) -> float:
        return max(self.target_standard_error**2, self.between_pairs)

    @property
    def options(self) -> dict[str, Any]:
        """
        The recommendation, as arguments of [`DiffusionVRPOConfig`].

        Without a number of draws if the policy is its reference: how small the noise of the score is cannot be known
        before there is a score.
        """
        name, count = self.recommended
        law = 1.0 if name == "VRPO paper" else self.level_concentration
        return {
            **({"num_mc_samples": count} if self.compares_with_reference else {}),
            **ESTIMATORS[name],
            "level_concentration": law,
        }

    def __str__(self) -> str:
        counts = sorted({count for _, count in self.variance})
        lines = [
            f"{self.num_pairs} pairs, {self.num_draws} draws of each response, beta = {self.beta}.",
            f"Chosen and rejected have the same token at {self.overlap:.0%} of their places.",
            f"Score: {self.margin:+.3f} +- {self.margin_spread:.3f} (mean and spread over pairs).",
            f"Noise of a single draw: {self._parts()}. Levels: {self._levels()}.",
            "",
            "Variance of the score (standard error over pairs); forwards of the policy per response = K",
            "| estimator | " + " | ".join(f"K = {count}" for count in counts) + " |",
            "|---|" + "---|" * len(counts),
        ]
        if not self.compares_with_reference:
            lines[2] = "The policy is its reference: log-probabilities stand in for log-ratios. Read ratios only."
        for name in ESTIMATORS:
            cells = [self._cell(name, count) for count in counts]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        options = ", ".join(f"{option}={value!r}" for option, value in self.options.items())
        return "\n".join([*lines, "", f"Recommended: {options}.", self._verdict()])

    def _levels(self) -> str:
        a = self.level_concentration
        if a is None:
            return "by length, the paper's uniform"
        return "uniform" if a == 1 else f"Beta({a:g}, {a:g}), the paper's uniform"

    def _parts(self) -> str:
        """Each is a difference of two estimates, and may come out below zero."""
        if self.num_draws < ENOUGH_DRAWS or min(self.parts.values()) < -0.05:
            return "too few pairs or draws to tell where it comes from"
        return ", ".join(f"{part} {max(share, 0):.0%}" for part, share in self.parts.items())

    def _verdict(self) -> str:
        name, count = self.recommended
        if not self.compares_with_reference:
            ratio = self.variance[name, count] / self.variance["VRPO paper", count]
            return (
                f"It has {ratio:.2f} of the variance of the paper's estimator at K = {count}. How many draws are "
                "enough can be told when the policy has moved: train for some steps and diagnose the adapter."
            )
        error, spread = self.variance[name, count] ** 0.5, self.between_pairs**0.5
        verdict = "small enough" if error**2 <= self._small_enough else "too large"
        return (
            f"Its standard error {error:.2f} is {verdict} (target {self.target_standard_error}, spread between pairs "
            f"{spread:.2f}), at {count / 8:g} times the forwards of the paper's K = 8."
        )

    def _cell(self, name: str, count: int) -> str:
        if (name, count) not in self.variance:
            return "-"
        return f"{self.variance[name, count]:.3g} ({self.error[name, count]:.1g})"
