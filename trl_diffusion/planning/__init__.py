"""
Will it fit: the bytes of a training step, before it is made.

Knows models, adapters and the cost of a step. Does not know datasets' contents, and never needs the memory it counts.
"""
