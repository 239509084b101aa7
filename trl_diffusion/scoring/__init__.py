"""
A model and its draws make an ELBO with its gradient, in the form in which TRL asks for a log-probability.

Knows the door to TRL, heads, adapters and gradients. Does not know datasets, losses, or the loop of a trainer.
"""
