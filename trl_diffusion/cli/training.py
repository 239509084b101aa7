"""Commands that train: the same options around another trainer."""

from functools import partial
from typing import Any

from ..scoring.door import DatasetMixtureConfig, ScriptArguments, get_peft_config, get_quantization_config
from ..trainers.elbo_kto.config import ELBOKTOConfig
from ..trainers.elbo_kto.trainer import ELBOKTOTrainer
from ..trainers.sft.config import DiffusionSFTConfig
from ..trainers.sft.trainer import DiffusionSFTTrainer
from ..trainers.vrpo.config import DiffusionVRPOConfig
from ..trainers.vrpo.trainer import DiffusionVRPOTrainer
from .arguments import IGNORED, TrainedModelConfig, load_datasets, with_model_init_kwargs
from .command import Command

_EXAMPLE = """\\
        --model_name_or_path GSAI-ML/LLaDA-8B-{model} --load_in_4bit --use_peft --lora_r 16 --lora_alpha 32 \\
        --dataset_name {data} --learning_rate {rate} --output_dir {folder}"""


def train(trainer_class: Any, script_args: Any, training_args: Any, model_args: Any, dataset_args: Any) -> None:
    """Train, save, and push to the hub if that was asked for."""
    trainer = trainer_class(
        model=model_args.model_name_or_path,
        args=with_model_init_kwargs(training_args, model_args),
        **load_datasets(script_args, training_args, dataset_args),
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.accelerator.print("Training completed.")

    trainer.save_model(training_args.output_dir)
    trainer.save_state()
    trainer.accelerator.print(f"Model saved to {training_args.output_dir}.")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
        trainer.accelerator.print(f"Model pushed to https://huggingface.co/{trainer.hub_model_id}.")


def _command(name: str, about: str, config: type, trainer: type, example: dict[str, str]) -> Command:
    arguments = (ScriptArguments, config, TrainedModelConfig, DatasetMixtureConfig)
    return Command(name, about, _EXAMPLE.format(**example), arguments, partial(train, trainer), IGNORED)


VRPO = _command(
    "vrpo",
    "Aligns a masked diffusion language model with pairs of a preferred and a rejected response (VRPO, arXiv "
    "2505.19223).",
    DiffusionVRPOConfig,
    DiffusionVRPOTrainer,
    {"model": "Instruct", "data": "trl-lib/ultrafeedback_binarized", "rate": "5e-6", "folder": "LLaDA-8B-VRPO"},
)
ELBO_KTO = _command(
    "elbo-kto",
    "Aligns a masked diffusion language model with single responses that are marked as desirable or not (ELBO-KTO, "
    "arXiv 2510.23658).",
    ELBOKTOConfig,
    ELBOKTOTrainer,
    {"model": "Instruct", "data": "trl-lib/kto-mix-14k", "rate": "5e-6", "folder": "LLaDA-8B-KTO"},
)
SFT = _command(
    "sft",
    "Fine-tunes a masked diffusion language model on completions, conversations or texts (LLaDA, arXiv 2502.09992).",
    DiffusionSFTConfig,
    DiffusionSFTTrainer,
    {"model": "Base", "data": "trl-lib/Capybara", "rate": "2e-5", "folder": "LLaDA-8B-SFT"},
)
