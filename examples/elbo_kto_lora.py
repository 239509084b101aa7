"""
Align a masked diffusion language model with ELBO-KTO (https://huggingface.co/papers/2510.23658), from completions that
are marked as desirable or not, without pairs.

Without arguments, a small model that this script makes itself is aligned on the CPU:

```bash
python examples/elbo_kto_lora.py
```

# LoRA on one GPU, the base model in 4 bit (QLoRA)

```bash
accelerate launch --config_file examples/accelerate_configs/single_gpu.yaml examples/elbo_kto_lora.py \
    --model_name_or_path GSAI-ML/LLaDA-8B-Instruct \
    --dataset_name trl-lib/kto-mix-14k \
    --load_in_4bit \
    --use_peft \
    --lora_r 16 \
    --lora_alpha 32 \
    --learning_rate 5.0e-6 \
    --per_device_train_batch_size 4 \
    --gradient_accumulation_steps 4 \
    --batch_composition balanced \
    --max_length 1024 \
    --output_dir LLaDA-8B-KTO
```

Rows of a batch run one after another: a larger batch adds a gradient of the adapter for each row, and no activations.
With a batch of one, set `--baseline ema`.

# LoRA

As above, without `--load_in_4bit` and with `--dtype bfloat16`.

# Full training, as in the authors' code (docs/paper-index.md gives the source of every value)

```bash
accelerate launch --config_file examples/accelerate_configs/fsdp2.yaml examples/elbo_kto_lora.py \
    --model_name_or_path GSAI-ML/LLaDA-8B-Instruct \
    --dataset_name trl-lib/kto-mix-14k \
    --dtype bfloat16 \
    --num_train_epochs 1 \
    --learning_rate 1.0e-6 \
    --lr_scheduler_type cosine \
    --warmup_steps 0.03 \
    --weight_decay 0.01 \
    --adam_beta2 0.95 \
    --per_device_train_batch_size 1 \
    --max_length 4096 \
    --mask_scheme fixed_count \
    --stratify False \
    --control_variate none \
    --append_eos False \
    --precompute_ref_log_probs True \
    --output_dir LLaDA-8B-KTO
```

Every option can stand in a YAML file instead: `--config my_run.yaml`. The dataset is in TRL's unpaired format, or in
its preference format, which is unpaired; a folder with `train.jsonl` and `test.jsonl` is one too.
"""

import sys

from trl_diffusion.cli.quiet import quiet_start

quiet_start()

from trl_diffusion.cli.training import ELBO_KTO

main = ELBO_KTO.run


def make_parser():
    return ELBO_KTO.parser()


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if not arguments:
        from embedded_default import embedded_arguments

        arguments = embedded_arguments(thumbs=True)
    main(*make_parser().parse_args_and_config(arguments))
