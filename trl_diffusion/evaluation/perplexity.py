"""What a likelihood of texts says: nats, perplexity per token and per byte, each with its error."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Likelihood:
    """
    Of some texts together. `str()` is a table.

    Args:
        nats: estimate of their log-likelihood: the ELBO, a lower bound, or the chain rule's.
        standard_error: of the estimate, from the spread of its masks; 0 where that is exact. NaN for a single draw.
        tokens: that were scored.
        bytes: of the texts that these tokens stand for, in UTF-8.
        rows: `nats`, `standard_error`, `tokens` and `bytes` of each text, or of each window of one.
    """

    nats: float
    standard_error: float
    tokens: int
    bytes: int
    rows: tuple[dict[str, Any], ...]

    @classmethod
    def of(cls, rows: Sequence[dict[str, Any]]) -> "Likelihood":
        """Of rows that were scored independently."""
        error = math.sqrt(sum(row["standard_error"] ** 2 for row in rows))
        nats, tokens, size = (sum(row[name] for row in rows) for name in ("nats", "tokens", "bytes"))
        return cls(nats, error, tokens, size, tuple(rows))

    def perplexity(self, unit: str = "tokens") -> tuple[float, float]:
        """
        `exp(-nats / number of units)` and its standard error, to first order; of an ELBO an upper bound.

        Args:
            unit: `"tokens"` or `"bytes"`.
        """
        number = getattr(self, unit)
        value = math.exp(-self.nats / number)
        return value, value * self.standard_error / number

    @property
    def bits_per_byte(self) -> tuple[float, float]:
        """`-log2(p) / bytes` and its standard error."""
        return -self.nats / self.bytes / math.log(2), self.standard_error / self.bytes / math.log(2)

    def __str__(self) -> str:
        named = {
            "nats": (self.nats, self.standard_error),
            "nats per token": (self.nats / self.tokens, self.standard_error / self.tokens),
            "perplexity per token": self.perplexity(),
            "perplexity per byte": self.perplexity("bytes"),
            "bits per byte": self.bits_per_byte,
        }
        head = f"{len(self.rows)} texts or windows, {self.tokens} tokens, {self.bytes} bytes"
        return "\n".join([head, *(f"{name:<22}{value:>14.4f} ± {error:.4f}" for name, (value, error) in named.items())])
