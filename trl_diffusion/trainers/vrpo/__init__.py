"""
VRPO (arXiv 2505.19223): preferences between two responses.

Knows its configuration and on which draws its loss is. Does not know unpaired feedback.
"""
