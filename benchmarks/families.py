"""
The figures of docs/models.md, in three minutes on a CPU: memory of a training step, and lines of code, by family.

    python benchmarks/families.py

A pair of 1024 tokens (512 for encoders that have no more positions), every one of them hidden in the worst draw, LoRA
(r = 16, where the family puts it), Adam, layers checkpointed, gradients accumulated, by `estimate_memory` without the
driver's gigabyte; weights in 4 bits, and in bfloat16. Lines are those of a family's own configuration and model class,
with their docstrings, and of its record.
"""

import ast
import inspect

from peft import LoraConfig
from transformers import BertConfig, DistilBertConfig, ElectraConfig, ModernBertConfig, RobertaConfig
from what_fits import LLADA_8B, NF4

from trl_diffusion import estimate_memory
from trl_diffusion.models import encoders
from trl_diffusion.models.decoders import configuration, family, nemotron
from trl_diffusion.models.families import class_to_load, family_of
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
    "BERT-base": BertConfig(),
    "RoBERTa-base": RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1),
    "DistilBERT-base": DistilBertConfig(),
    "ModernBERT-base": ModernBertConfig(),
    "ELECTRA-small": ElectraConfig(),
}


def bytes_of_a_step(config, quantization_config=NF4):
    longest = 512 if config.max_position_embeddings < 1024 else 1024
    options = {"max_length": longest, "peft_config": LoraConfig(r=16), "gradient_accumulation_steps": 2}
    return estimate_memory(config, quantization_config=quantization_config, **options).total


def lines_of_code(config):
    """Of the classes and the record that a family has for itself."""
    classes = [type(config), class_to_load(config)._model_mapping[type(config)]]
    classes = [each for each in classes if each.__module__.startswith("trl_diffusion.")]
    name = family_of(config).name
    sources = [ast.parse(inspect.getsource(module)) for module in (family, llada_family, encoders)]
    calls = [node for source in sources for node in ast.walk(source) if isinstance(node, ast.Call)]
    (record,) = (call for call in calls if name in _names(call))
    return sum(len(inspect.getsource(each).splitlines()) for each in classes) + record.end_lineno - record.lineno + 1


def _names(call):
    """What a record is called: its `name`, or what an encoder begins with."""
    values = [keyword.value for keyword in call.keywords if keyword.arg == "name"]
    return [getattr(value, "value", "") for value in (*values, *call.args[:1])]


def main():
    print("| | lines of code | GB in 4 bits | GB in bfloat16 |\n|---|---|---|---|")
    for name, config in MODELS.items():
        sizes = [f"{bytes_of_a_step(config, quantization) / 1e9:.1f}" for quantization in (NF4, None)]
        print(f"| {name} | {lines_of_code(config)} | {' | '.join(sizes)} |", flush=True)


if __name__ == "__main__":
    main()
