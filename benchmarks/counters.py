"""Costs that can be counted instead of timed, so that they do not depend on what else the machine does."""

import platform
from importlib.metadata import version

import torch
from torch.utils.flop_counter import FlopCounterMode

from trl_diffusion import MaskSampler
from trl_diffusion.planning.live_bytes import LiveBytes

__all__ = ["HidesEverything", "LiveBytes", "machine", "matmul_flops"]


class HidesEverything(MaskSampler):
    """The worst draw, every time: the output head's share of memory grows with the tokens that one draw hides."""

    def __call__(self, maskable, rows, attention_mask=None, nonce=0, blocks=None):
        draws = super().__call__(maskable, rows, attention_mask, nonce, blocks=blocks)
        draws.masked[:] = maskable
        return draws


def matmul_flops(run) -> int:
    """FLOPs of the matrix products of `run()`, attention excluded."""
    in_place = {torch.ops.aten.addmm_: lambda acc, a, b, **_: 2 * a[0] * a[1] * b[1]}  # not known to the counter
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        run()
    return sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))


def machine() -> str:
    """One line for under a table: what it was measured on."""
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"{platform.machine()} CPU"
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "trl_diffusion"))
    return f"{device}, {torch.get_num_threads()} threads; Python {platform.python_version()}, {packages}"
