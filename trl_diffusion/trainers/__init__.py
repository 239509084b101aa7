"""
TRL's trainers with an ELBO in the place of the log-probability: what the methods share, and a room for each.

Knows data, references, losses and metrics. Does not know how masks are drawn or how an ELBO gets its gradient.
"""
