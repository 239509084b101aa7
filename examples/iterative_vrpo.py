"""
VRPO in rounds: let the model answer prompts, score the answers, align it with pairs of them, and begin again.

Without arguments, a small model that this script makes itself goes through two rounds on the CPU, in about a minute:

```bash
python examples/iterative_vrpo.py
```

# LoRA on one GPU, the base model in 4 bit (QLoRA)

```bash
accelerate launch --config_file examples/accelerate_configs/single_gpu.yaml examples/iterative_vrpo.py \
    --model_name_or_path GSAI-ML/LLaDA-8B-Instruct \
    --dataset_name trl-lib/DeepMath-103K \
    --reward_funcs accuracy_reward \
    --num_rounds 3 \
    --prompts_per_round 1000 \
    --num_samples 8 \
    --max_new_tokens 256 \
    --block_length 32 \
    --load_in_4bit \
    --use_peft \
    --lora_r 16 \
    --lora_alpha 32 \
    --learning_rate 5.0e-6 \
    --per_device_train_batch_size 1 \
    --gradient_accumulation_steps 16 \
    --loss_type sigmoid sft \
    --loss_weights 1.0 0.05 \
    --output_dir LLaDA-8B-rounds
```

The dataset has a column `prompt`, and others that reward functions read. Steps and learning rate are those of a round.
The same command goes on where it was interrupted, and adds rounds with a larger `--num_rounds`: see
docs/pairs-from-the-model.md. Every option can stand in a YAML file instead: `--config my_run.yaml`.
"""

import sys

from trl_diffusion.cli.quiet import quiet_start

quiet_start()

from trl_diffusion.cli.rounds import ITERATIVE_VRPO

main = ITERATIVE_VRPO.run


def make_parser():
    return ITERATIVE_VRPO.parser()


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if not arguments:
        from embedded_default import embedded_rounds

        arguments = embedded_rounds()
    main(*make_parser().parse_args_and_config(arguments))
