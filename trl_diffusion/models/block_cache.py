"""
What lies outside a block, computed once while the block is filled: Fast-dLLM's caches (arXiv 2505.22618, section 3).

An approximation. A model that sees both sides changes the keys and values of every token with every token that is
revealed; here those outside of the block are those of when it began. `"prefix"` keeps what is before the block, and a
step runs the block and what follows; `"dual"` keeps what follows, too, and a step runs the block alone. What the models
of `block_sampler.py` keep is exact, by the same means.
"""

import inspect
from typing import Any

import torch

from .blocks import History, Layers, name_of_cache, run_on
from .families import family_of
from .logits import logits_of
from .row_logits import logits_at


class BlockCache:
    """
    Logits of one block after the other.

    Each row goes by its own steps, so that what it is answered does not depend on those beside it.

    Args:
        model: that sees both sides.
        kind: `"prefix"` or `"dual"`.
        refresh: steps of a row after which all is computed anew; by default only when a block begins.

    Raises:
        ValueError: the model's layers do not take what was kept.
    """

    def __init__(self, model: Any, kind: str, refresh: int | None):
        self.model, self.kind, self.refresh = model, kind, refresh
        self._block = (0, 0)
        self._kept: dict[int, tuple[torch.Tensor, ...]] = {}
        self._steps: dict[int, int] = {}
        self._is_tried = False
        backbone: Any = model.base_model.__class__
        if name_of_cache(backbone) not in inspect.signature(backbone.forward).parameters:
            self._refuse("does not take them")

    def __call__(
        self, rows: torch.Tensor, real: torch.Tensor, numbers: list[int], block: tuple[int, int]
    ) -> torch.Tensor:
        """
        Args:
            rows: `(B, L)` tokens.
            real: `(B, L)`, one at tokens that are not padding, which is on the left.
            numbers: the B numbers of the rows, by which they are known in other steps.
            block: its first place, and that after its last.

        Returns:
            `(B, n, V)` logits that predict the n tokens of the block.
        """
        if block != self._block:
            self._block, self._kept, self._steps = block, {}, {}
        taken = [self._steps.get(number, 0) for number in numbers]
        self._steps.update((number, steps + 1) for number, steps in zip(numbers, taken, strict=True))
        begins = torch.tensor([steps % self.refresh == 0 if self.refresh else steps == 0 for steps in taken])
        found: dict[int, torch.Tensor] = {}
        for some, ask in ((begins, self._whole), (~begins, self._part)):
            places = some.nonzero().squeeze(1)
            if len(places) == len(rows):
                return ask(rows, real, numbers)
            if len(places):
                logits = ask(rows[places], real[places], [numbers[place] for place in places.tolist()])
                found.update(zip(places.tolist(), logits, strict=True))
        return torch.stack([found[place] for place in range(len(rows))])

    def _whole(self, rows: torch.Tensor, real: torch.Tensor, numbers: list[int]) -> torch.Tensor:
        """Everything is run, and what lies outside of the window is kept."""
        layers = Layers(_nothing(rows), keeps=True)
        hidden = run_on(layers, self.model, rows, real.bool().unsqueeze(1), _positions(real))
        if not layers.kept:
            self._refuse("does not hand them out")
        outside, window, wanted = self._places(rows)
        states = [state[:, :, outside] for layer in sorted(layers.kept) for state in layers.kept[layer]]
        self._kept.update(
            (number, tuple(state[row : row + 1] for state in states)) for row, number in enumerate(numbers)
        )
        if not self._is_tried:
            exact = logits_at(self.model, rows[:1], real[:1], window[wanted])
            self._try(exact, self._part(rows[:1], real[:1], numbers[:1]))
        return logits_of(self.model, hidden[:, window[wanted]])

    def _part(self, rows: torch.Tensor, real: torch.Tensor, numbers: list[int]) -> torch.Tensor:
        """The window is run, behind what was kept."""
        outside, window, wanted = self._places(rows)
        states = tuple(torch.cat(each) for each in zip(*(self._kept[number] for number in numbers), strict=True))
        layers = Layers(History(outside, states), keeps=False)
        mask = real.bool()[:, torch.cat([outside, window])].unsqueeze(1)
        hidden = run_on(layers, self.model, rows[:, window], mask, _positions(real)[:, window])
        return logits_of(self.model, hidden[:, wanted])

    def _places(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Places outside of the window, those in it, and which of these predict the tokens of the block."""
        everywhere = torch.arange(rows.shape[1], device=rows.device)
        predicting = family_of(self.model.config).predicting(everywhere[slice(*self._block)])
        first, last = predicting[0], self._block[1] if self.kind == "dual" else rows.shape[1]
        is_inside = (everywhere >= first) & (everywhere < last)
        return everywhere[~is_inside], everywhere[is_inside], predicting - first

    def _try(self, exact: torch.Tensor, part: torch.Tensor) -> None:
        """
        Before anything is revealed the two have to be equal, up to half of the digits: positions may be counted
        otherwise, attention be local, or layers not take what was kept.
        """
        self._is_tried = True
        apart = (part.float() - exact.float()).norm() / exact.float().norm()
        if not bool(apart <= torch.finfo(exact.dtype).eps ** 0.5):
            self._refuse(f"computes something else behind them, {apart:.1e} of the logits apart")

    def _refuse(self, what: str) -> None:
        raise ValueError(
            f"`block_cache={self.kind!r}` needs a model whose layers take keys and values that were kept, and "
            f"`{type(self.model).__name__}` {what}. Leave `block_cache` out."
        )


def _nothing(rows: torch.Tensor) -> History:
    return History(rows.new_empty(0))


def _positions(real: torch.Tensor) -> torch.Tensor:
    return (real.long().cumsum(1) - 1).clamp(min=0)
