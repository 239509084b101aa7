"""
Supervised fine-tuning (LLaDA, arXiv 2502.09992): completions to imitate.

Knows its configuration, which part of a row is learnt, and what the loss is a mean of. Does not know references.
"""
