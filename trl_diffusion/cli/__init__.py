"""
The command `trl-diffusion`, and what the scripts in `examples/` share with it.

Knows command lines. Does not know anything that could not be called from Python as well.
"""
