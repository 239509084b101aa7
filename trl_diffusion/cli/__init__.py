"""
What the scripts in `examples/` share.

Knows command lines. Does not know anything that could not be called from Python as well.
"""
