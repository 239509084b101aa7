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

from dataclasses import dataclass, field

from trl_diffusion.cli.quiet import quiet_start

quiet_start()

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DatasetMixtureConfig, ScriptArguments, get_quantization_config

from trl_diffusion import DiffusionVRPOConfig, diagnose_variance
from trl_diffusion.cli.arguments import DiffusionModelConfig, load_datasets, with_model_init_kwargs
from trl_diffusion.cli.parser import OptionParser


@dataclass
class DiagnosisArguments:
    """What is measured."""

    adapter_name_or_path: str | None = field(default=None, metadata={"help": "Adapter of the policy."})
    num_pairs: int = field(default=16, metadata={"help": "Pairs that are scored."})
    num_draws: int = field(default=64, metadata={"help": "Draws of each response, a multiple of 32."})
    target_standard_error: float = field(default=0.5, metadata={"help": "What the recommended K has to reach."})


def main(script_args, training_args, model_args, dataset_args, diagnosis):
    training_args = with_model_init_kwargs(training_args, model_args)
    quantization_config, model, tokenizer = get_quantization_config(model_args), model_args.model_name_or_path, None
    if diagnosis.adapter_name_or_path:
        base = AutoModelForCausalLM.from_pretrained(
            model, quantization_config=quantization_config, **training_args.model_init_kwargs
        )
        tokenizer, quantization_config = AutoTokenizer.from_pretrained(model), None
        model = PeftModel.from_pretrained(base, diagnosis.adapter_name_or_path)
    report = diagnose_variance(
        model,
        dataset=load_datasets(script_args, training_args, dataset_args)["train_dataset"],
        args=training_args,
        processing_class=tokenizer,
        quantization_config=quantization_config,
        num_pairs=diagnosis.num_pairs,
        num_draws=diagnosis.num_draws,
        target_standard_error=diagnosis.target_standard_error,
    )
    print(report)


def make_parser():
    return OptionParser(
        (ScriptArguments, DiffusionVRPOConfig, DiffusionModelConfig, DatasetMixtureConfig, DiagnosisArguments)
    )


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
