"""
Counter-based randomness: numbers that are a function of what they are asked for, with no generator state.

The finaliser of SplitMix64 (Steele, Lea, Flood 2014) over int64 tensors, whose products wrap around as they should.
"""

import torch

_MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64


def mix(x: torch.Tensor) -> torch.Tensor:
    """64 bits of each element that look independent of those of any other number."""
    x = x * _GOLDEN + _GOLDEN
    x = (x ^ _shift_right(x, 30)) * _MULTIPLIERS[0]
    x = (x ^ _shift_right(x, 27)) * _MULTIPLIERS[1]
    return x ^ _shift_right(x, 31)


def mix_int(value: int) -> int:
    """[`mix`] of a number."""
    return int(mix(torch.tensor(value, dtype=torch.int64)))


def uniform(bits: torch.Tensor) -> torch.Tensor:
    """Float64 in [0, 1) from the upper 53 bits."""
    return _shift_right(bits, 11).double() * 2.0**-53


def hash_rows(rows: torch.Tensor, real: torch.Tensor, salt: int = 0) -> torch.Tensor:
    """
    A 64-bit content hash of each row, which does not depend on padding.

    Args:
        rows: `(B, L)` integers.
        real: `(B, L)` bool, the positions that belong to the row.
        salt: changes the hash.

    Returns:
        `(B,)` int64.
    """
    place = real.long().cumsum(-1)
    return mix((mix(mix(place) + rows.long()) * real).sum(-1) + mix_int(salt))


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift: torch's shifts an int64 arithmetically."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
