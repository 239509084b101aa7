"""
ELBO-KTO (arXiv 2510.23658): single responses that were liked or not.

Knows its configuration, its baselines and the order of its rows. Does not know pairs.
"""
