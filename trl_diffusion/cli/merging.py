"""The command that merges an adapter into its base model."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftModel

from ..checks.inputs import check_writable
from .arguments import OF_TRAINING_ALONE, UsedModelConfig, load_to_use
from .command import Command


@dataclass
class MergeArguments:
    """Where the merged model goes."""

    output_dir: str = field(default="merged", metadata={"help": "Folder of the merged model and its tokenizer."})
    use_cpu: bool = field(default=True, metadata={"help": "Whether to merge on the CPU, which has more memory."})


def merge(model_args: Any, arguments: MergeArguments) -> None:
    """Write the merged model under the published names."""
    if model_args.load_in_4bit or model_args.load_in_8bit:
        raise ValueError(
            "Merging into quantised weights rounds what was learnt away: leave `--load_in_4bit` and "
            "`--load_in_8bit` out."
        )
    if (Path(arguments.output_dir) / "adapter_config.json").exists():
        raise ValueError(
            f"`--output_dir {arguments.output_dir}` holds an adapter, which would be put on the merged model once more "
            "wherever it is loaded. Give another folder."
        )
    check_writable(arguments.output_dir)
    model, tokenizer = load_to_use(model_args, arguments.use_cpu)
    if not isinstance(model, PeftModel):
        raise ValueError(
            f"`--model_name_or_path {model_args.model_name_or_path}` is no adapter, so there is nothing to merge: give "
            "the folder that a trainer wrote with `--use_peft`."
        )
    model.merge_and_unload().save_pretrained(arguments.output_dir)
    tokenizer.save_pretrained(arguments.output_dir)
    print(f"Merged model in {arguments.output_dir}.")


MERGE = Command(
    "merge",
    "Merges an adapter into its base model, which can then be loaded, served and trained on as any other.",
    "--model_name_or_path LLaDA-8B-VRPO --dtype bfloat16 --output_dir merged",
    (UsedModelConfig, MergeArguments),
    merge,
    OF_TRAINING_ALONE,
)
