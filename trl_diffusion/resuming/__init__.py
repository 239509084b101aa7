"""
What of a run is stored beside its weights, and from where it can go on.

Knows which checkpoint is whole, what a run was, and what a difference means for one that resumes it. Does not know any
method: a configuration says which of its options belong to the record.
"""
