"""
What is refused before a GPU minute is spent: options, models, rows, and numbers that are not finite.

Knows the rules and the cures. Does not know how anything is computed, and changes nothing that it looks at.
"""
