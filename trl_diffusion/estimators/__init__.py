"""
What is masked, what a masked token weighs, and what the estimate is worth: masks, weights, ELBO, variance.

Knows torch. Does not know models, tokenizers, trainers, or where a log-probability comes from.
"""
