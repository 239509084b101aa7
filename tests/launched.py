"""A script as `accelerate launch` starts it, on a machine without accelerators: `launched.py LAUNCH SCRIPT ...`."""

import os
import runpy
import sys

import torch
from matrix import as_on_accelerators

launch, script = sys.argv[1:3]
sys.argv = sys.argv[2:]
sys.path.insert(0, os.path.dirname(script))
with as_on_accelerators(launch):
    runpy.run_path(script, run_name="__main__")
assert not torch.distributed.is_initialized()  # the script has ended its process group, as TRL's do
