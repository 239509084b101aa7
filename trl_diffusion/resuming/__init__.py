"""
What of a run is stored beside its weights, and from where it can go on.

Knows checkpoints and the record of a run. Does not know what the record means to the method that wrote it.
"""
