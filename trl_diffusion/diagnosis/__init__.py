"""
How noisy the preference score is on a user's own model and data, and which estimator to take.

Knows how to score a few pairs and read every estimator off them. Does not know how to train.
"""
