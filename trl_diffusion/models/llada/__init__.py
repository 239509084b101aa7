"""
Dense LLaDA (arXiv 2502.09992): its configuration and its layers, under the published names.

Knows one architecture. Does not know masks, ELBOs or training.
"""
