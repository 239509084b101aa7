"""
Decoders, and what was made of them, that predict masked tokens: from both sides, or block by block.

Knows which class of transformers computes each, and what its published configuration may not ask for. Does not know
masks, ELBOs or training.
"""
