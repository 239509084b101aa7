"""
Causal decoders of transformers that predict masked tokens from both sides: iLLaDA, Dream, and converted Qwen and Llama.

Knows which class of transformers computes each, and what its published configuration may not ask for. Does not know
masks, ELBOs or training.
"""
