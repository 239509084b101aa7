"""
In which order desirable and undesirable rows are met, so that a global micro-batch holds both classes.

A batch-mean baseline compares the rows of a batch with each other; in a batch of one class it compares like with like.
The order is a function of (seed, epoch), so every process and a resumed run have the same.
"""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

COMPOSITIONS = ("random", "balanced", "alternating")


class ComposedSampler(Sampler[int]):
    """
    Indices of a dataset, each once an epoch, its classes spread or alternating.

    Args:
        desirable: label of each row.
        composition: `"balanced"` spreads the rarer class evenly, so that each stretch of n rows holds its share of
            it to within one row; `"alternating"` takes one of each class in turn, and then what is left of the larger.
        seed: of the order within a class.
    """

    def __init__(self, desirable: Sequence[bool], composition: str, seed: int):
        self.rows = [[i for i, label in enumerate(desirable) if bool(label) is wanted] for wanted in (True, False)]
        self.composition = composition
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate at the start of an epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(map(len, self.rows))

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        shuffled = [[rows[i] for i in torch.randperm(len(rows), generator=generator)] for rows in self.rows]
        places = self._places(*map(len, shuffled))
        ranked = sorted(zip(places, [*shuffled[0], *shuffled[1]], strict=True))
        return iter([row for _, row in ranked])

    def _places(self, num_desirable: int, num_undesirable: int) -> list[tuple[float, int]]:
        """A sort key for each row, the desirable ones first."""
        counts = (num_desirable, num_undesirable)
        if self.composition == "alternating":
            return [(float(i), label) for label, count in enumerate(counts) for i in range(count)]
        return [((i + 0.5) / count, label) for label, count in enumerate(counts) for i in range(count)]
