"""
What a model is worth, and what it says: answers to prompts and their rewards, and the likelihood of texts.

Knows samplers, reward functions and files that an interrupted run goes on with. Does not know the loop of a trainer.
"""
