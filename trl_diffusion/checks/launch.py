"""
What is asked for around a run and makes no run here: by the variables that `accelerate launch` sets, or by arguments.

Each would train on a wrong number, or fail inside a library, after the model has been loaded.
"""

import os
from typing import Any

from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

_SPLIT = {
    "tp_size": "the layers are cut up (tensor parallelism), and the output head is used by its whole weight",
    "cp_size": "a row is cut up (context parallelism), and a response is scored on all of its row",
    "sp_size": "a row is cut up (sequence parallelism), and a response is scored on all of its row",
}


def check_launch(args: Any) -> None:
    """
    Refuse ways of training that split what a score needs whole.

    Args:
        args: the configuration, after transformers has read it.

    Raises:
        ValueError: names the option.
    """
    if _set("ACCELERATE_USE_MEGATRON_LM"):
        raise ValueError(
            "`distributed_type: MEGATRON_LM` replaces the model by one of its own, which has no ELBO. Launch with "
            "FSDP2 or ZeRO-3, see examples/accelerate_configs."
        )
    by_arguments = (args.fsdp_plugin_args or {}).get("fsdp_version")
    by_launcher = os.environ.get("FSDP_VERSION", "1") if _set("ACCELERATE_USE_FSDP") else None  # as accelerate has it
    if "1" in (str(by_arguments), by_launcher if by_arguments is None else None):
        raise ValueError(
            "FSDP1 hands out views of one flat tensor in the place of weights, and nothing here was run with it. Set "
            "`fsdp_version: 2` in the `fsdp_config` of `accelerate launch`, as in "
            "examples/accelerate_configs/fsdp2.yaml, or `fsdp_config={'version': 2}` in the arguments."
        )
    for size, why in _SPLIT.items():
        variable = f"PARALLELISM_CONFIG_{size.upper()}"
        by_launcher = os.environ.get(variable, "1") if _set("ACCELERATE_USE_PARALLELISM_CONFIG") else "1"
        number = getattr(args.parallelism_config, size, None) or int(by_launcher)
        if number > 1:
            raise ValueError(f"`parallelism_config` with `{size}={number}` is not supported: {why}. Leave it at 1.")


def check_launch_to_use() -> None:
    """
    Refuse a launch that shards weights where a model is to answer or to be scored: each process needs all of it.

    transformers would leave weights empty on all processes but the first, without a word.

    Raises:
        ValueError: names the launch.
    """
    sharded = "FSDP2" if _set("ACCELERATE_USE_FSDP") else "ZeRO-3" if is_deepspeed_zero3_enabled() else ""
    if sharded:
        raise ValueError(
            f"{sharded} shards the weights, and a model that answers or is scored is whole on each process. Launch "
            "this with `multi_gpu`, or on one device; sharded training is for `vrpo`, `elbo-kto` and `sft`."
        )


def _set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"
