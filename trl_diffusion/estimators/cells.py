"""
What is drawn for, independently of all else: a row, or each block of a row.

The likelihood bound of a block diffusion model is a sum over blocks of bounds of their own, so that a block is to a
draw what a row was. Here tokens are laid out so that it is one: by cells `(C, W)`, which a scheme takes for rows. One
draw hides something of every block at once.
"""

from dataclasses import dataclass

import torch

from .hashing import mix


@dataclass(frozen=True)
class Cells:
    """
    Tokens that may be masked, by cells.

    Args:
        maskable: `(C, W)` bool, where a cell has a token that may be masked.
        where: `(C, W)` int64, its place among the `(B * L)` of the rows; none where a cell is a row as it is.
        row: `(C,)` int64.
        number: `(C,)` int64, of the block.
        shape: B and L.
    """

    maskable: torch.Tensor
    where: torch.Tensor | None = None
    row: torch.Tensor | None = None
    number: torch.Tensor | None = None
    shape: tuple[int, int] = (0, 0)

    def keys(self, of_rows: torch.Tensor) -> torch.Tensor:
        """`(C,)` what names a cell, from what names a row `(B,)`."""
        if self.row is None or self.number is None:
            return of_rows
        return mix(of_rows[self.row] + mix(self.number))

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """`(..., C, W)` of `(..., B, L)`."""
        return values if self.where is None else values.flatten(-2)[..., self.where] * self.maskable

    def scatter(self, values: torch.Tensor) -> torch.Tensor:
        """`(..., B, L)` of `(..., C, W)`, zero where no cell has a token."""
        if self.where is None:
            return values
        flat = values.new_zeros(*values.shape[:-2], self.shape[0] * self.shape[1])
        flat[..., self.where[self.maskable]] = values[..., self.maskable]
        return flat.unflatten(-1, self.shape)

    def add_up(self, values: torch.Tensor) -> torch.Tensor:
        """`(..., B)` sums over the cells of each row, of `(..., C)`."""
        if self.row is None:
            return values
        return values.new_zeros(*values.shape[:-1], self.shape[0]).index_add(-1, self.row, values)


def find_cells(maskable: torch.Tensor, blocks: torch.Tensor | None) -> Cells:
    """
    The cells of rows.

    Args:
        maskable: `(B, L)` bool.
        blocks: `(B, L)` int64, the number of each token's block; without them a row is a cell.

    Raises:
        ValueError: the numbers of a row's maskable tokens go down.
    """
    if blocks is None:
        return Cells(maskable)
    places = maskable.flatten().nonzero().squeeze(1)
    row, number = places // maskable.shape[1], blocks.flatten()[places].long()
    same_row = row[1:] == row[:-1]
    if bool((same_row & (number[1:] < number[:-1])).any()):
        raise ValueError("`blocks` must number the blocks of a row from left to right, and some numbers go down.")
    begins = torch.ones_like(places, dtype=torch.bool)
    begins[1:] = ~same_row | (number[1:] != number[:-1])
    starts, cell = begins.nonzero().squeeze(1), begins.long().cumsum(0) - 1
    slot = torch.arange(len(places), device=places.device) - starts[cell]
    where = places.new_zeros(len(starts), int(slot.max()) + 1)
    there = torch.zeros_like(where, dtype=torch.bool)
    where[cell, slot], there[cell, slot] = places, True
    return Cells(there, where, row[starts], number[starts], (maskable.shape[0], maskable.shape[1]))
