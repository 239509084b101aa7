"""
Align a masked diffusion language model with VRPO (https://huggingface.co/papers/2505.19223).

Without arguments, a small model that this script makes itself is aligned on the CPU, in about a minute:

```bash
python examples/vrpo_lora.py
```

# LoRA on one GPU, the base model in 4 bit (QLoRA)

```bash
accelerate launch --config_file examples/accelerate_configs/single_gpu.yaml examples/vrpo_lora.py \
    --model_name_or_path GSAI-ML/LLaDA-8B-Instruct \
    --dataset_name trl-lib/ultrafeedback_binarized \
    --load_in_4bit \
    --use_peft \
    --lora_r 16 \
    --lora_alpha 32 \
    --learning_rate 5.0e-6 \
    --per_device_train_batch_size 1 \
    --gradient_accumulation_steps 16 \
    --max_length 1024 \
    --loss_type sigmoid sft \
    --loss_weights 1.0 0.05 \
    --output_dir LLaDA-8B-VRPO
```

# LoRA

As above, without `--load_in_4bit` and with `--dtype bfloat16`.

# Full training, as in the paper (docs/paper-index.md gives the source of every value)

```bash
accelerate launch --config_file examples/accelerate_configs/fsdp2.yaml examples/vrpo_lora.py \
    --model_name_or_path GSAI-ML/LLaDA-8B-Instruct \
    --dataset_name trl-lib/ultrafeedback_binarized \
    --dtype bfloat16 \
    --num_train_epochs 1 \
    --learning_rate 5.0e-7 \
    --lr_scheduler_type cosine \
    --warmup_steps 15 \
    --weight_decay 0.01 \
    --adam_beta2 0.95 \
    --per_device_train_batch_size 1 \
    --gradient_accumulation_steps 8 \
    --max_length 4096 \
    --mask_scheme fixed_count \
    --stratify False \
    --control_variate none \
    --couple_pairs False \
    --loss_type sigmoid sft \
    --loss_weights 1.0 0.05 \
    --output_dir LLaDA-8B-VRPO
```

Every option can stand in a YAML file instead: `--config my_run.yaml`. The dataset is in TRL's preference format; a
folder with `train.jsonl` and `test.jsonl` is one too.
"""

import sys

from trl_diffusion.cli.quiet import quiet_start

quiet_start()

from trl_diffusion.cli.training import VRPO

main = VRPO.run


def make_parser():
    return VRPO.parser()


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if not arguments:
        from embedded_default import embedded_arguments

        arguments = embedded_arguments()
    main(*make_parser().parse_args_and_config(arguments))
