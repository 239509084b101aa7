"""
Which examples fit on which card: the table of docs/memory-and-speed.md, in two to three minutes on a CPU.

    python benchmarks/what_fits.py

LLaDA-8B with LoRA (r = 16, all linear layers of the blocks), Adam, one pair a micro-batch, every token of the example
hidden in the worst draw, gradients accumulated, by `estimate_memory` and a gigabyte for the driver and for gaps.
"""

import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig

from trl_diffusion import LLaDAConfig, MemoryEstimate, estimate_memory
from trl_diffusion.planning.memory import RESERVED

LLADA_8B = LLaDAConfig(mlp_hidden_size=12288)
NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_compute_dtype=torch.bfloat16,
    bnb_4bit_use_double_quant=True,
)
CARDS = (12, 16, 24, 48, 80)  # GB
LENGTHS = (512, 768, 1024, 1536, 2048, 3072, 4096)  # LLaDA was trained on up to 4096 tokens
SETTINGS = {
    "nf4, layer checkpointing": (NF4, True),
    "nf4, no layer checkpointing": (NF4, False),
    "int8, layer checkpointing": (BitsAndBytesConfig(load_in_8bit=True), True),
    "bfloat16, layer checkpointing": (None, True),
    "bfloat16, no layer checkpointing": (None, False),
}


def estimate(setting: str, length: int) -> MemoryEstimate:
    quantization_config, layers = SETTINGS[setting]
    return estimate_memory(
        LLADA_8B,
        max_length=length,
        peft_config=LoraConfig(r=16),
        quantization_config=quantization_config,
        gradient_checkpointing=layers,
        gradient_accumulation_steps=2,  # or more
    )


def needed(setting: str, length: int) -> int:
    return estimate(setting, length).total + RESERVED


def main():
    print(f"| | GB at 1024 tokens | {' | '.join(f'{card} GB' for card in CARDS)} |\n|{'---|' * (2 + len(CARDS))}")
    for setting in SETTINGS:
        sizes = {length: needed(setting, length) for length in LENGTHS}
        longest = [max((n for n, size in sizes.items() if size <= card * 10**9), default="-") for card in CARDS]
        print(f"| {setting} | {sizes[1024] / 1e9:.1f} | {' | '.join(map(str, longest))} |", flush=True)
    print(f"\n{estimate('nf4, layer checkpointing', 1024)}")


if __name__ == "__main__":
    main()
