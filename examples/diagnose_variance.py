"""
How noisy is the preference score on your model and your data, and which estimator and how many draws to take?

Run it before the first training of a model: it costs a few thousand forwards and no backward, and can be interrupted.

```bash
python examples/diagnose_variance.py \
    --model_name_or_path GSAI-ML/LLaDA-8B-Instruct \
    --dataset_name trl-lib/ultrafeedback_binarized \
    --load_in_4bit --dtype bfloat16 \
    --output_dir diagnosis
```

With `--adapter_name_or_path` the policy is the model with that adapter, and the reference the model without it. Without
one the policy is its reference: log-probabilities then stand in for log-ratios, estimators can be compared, and how
many draws are enough cannot be told.
Other options are those of `vrpo_lora.py`; those of the estimator are not used.
"""

from trl_diffusion.cli.quiet import quiet_start

quiet_start()

from trl_diffusion.cli.judging import DIAGNOSE

main = DIAGNOSE.run


def make_parser():
    return DIAGNOSE.parser()


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
