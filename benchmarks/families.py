"""
The figures of docs/models.md, in three minutes on a CPU: memory of a training step, and lines of code, by family.

    python benchmarks/families.py

A pair of 1024 tokens, every one of them hidden in the worst draw, LoRA (r = 16, where the family puts it), Adam, layers
checkpointed, gradients accumulated, by `estimate_memory` without the driver's gigabyte; weights in 4 bits, and in
bfloat16. Lines are those of a family's own configuration and model class, with their docstrings, and of its record.
"""

import ast
import inspect

from peft import LoraConfig
from transformers import AutoModelForCausalLM
from what_fits import LLADA_8B, NF4

from trl_diffusion import estimate_memory
from trl_diffusion.models.decoders import configuration, family, nemotron
from trl_diffusion.models.families import family_of
from trl_diffusion.models.llada import family as llada_family

QWEN3_06B = {"vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28}
QWEN3_06B |= {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True}
MODELS = {
    "LLaDA-8B": LLADA_8B,
    "iLLaDA-8B": configuration.ILLaDAConfig(),
    "Dream-7B": configuration.DreamConfig(),
    "Qwen3-0.6B, converted": configuration.A2DQwen3Config(mask_token_id=151669, **QWEN3_06B),
    "LLaDA-MoE-7B-A1B": configuration.LLaDAMoEConfig(),
    "Nemotron-Labs-Diffusion-8B": nemotron.NemotronLabsDiffusionConfig(),
}


def bytes_of_a_step(config, quantization_config=NF4):
    options = {"max_length": 1024, "peft_config": LoraConfig(r=16), "gradient_accumulation_steps": 2}
    return estimate_memory(config, quantization_config=quantization_config, **options).total


def lines_of_code(config):
    """Of the classes and the record that a family has for itself."""
    classes = [type(config), AutoModelForCausalLM._model_mapping[type(config)]]
    name = family_of(config).name
    sources = [ast.parse(inspect.getsource(module)) for module in (family, llada_family)]
    calls = [node for source in sources for node in ast.walk(source) if isinstance(node, ast.Call)]
    (record,) = (c for c in calls if any(k.arg == "name" and getattr(k.value, "value", "") == name for k in c.keywords))
    return sum(len(inspect.getsource(each).splitlines()) for each in classes) + record.end_lineno - record.lineno + 1


def main():
    print("| | lines of code | GB in 4 bits | GB in bfloat16 |\n|---|---|---|---|")
    for name, config in MODELS.items():
        sizes = [f"{bytes_of_a_step(config, quantization) / 1e9:.1f}" for quantization in (NF4, None)]
        print(f"| {name} | {lines_of_code(config)} | {' | '.join(sizes)} |", flush=True)


if __name__ == "__main__":
    main()
