"""
Entries of a configuration that its class does not know, and that would make another model.

transformers keeps unknown entries and does nothing with them: a checkpoint that was trained with one would load, and be
another function, in silence.
"""

import inspect
from typing import Any

from transformers import PreTrainedConfig

# Switches of known architectures, and the value with which they change nothing. `None` never does
SWITCHES: dict[str, Any] = {
    "alibi": False,
    "attn_logit_softcapping": None,
    "clip_qkv": None,
    "final_logit_softcapping": None,
    "logit_scale": None,
    "num_experts": None,
    "position_embedding_type": "absolute",  # of BERT: transformers had relative ones once
    "use_mrope": False,
}


def refuse_switches(config: PreTrainedConfig) -> None:
    """
    Refuse a configuration with an entry that its class does not know and that is not off.

    Raises:
        ValueError: names the entry.
    """
    known = inspect.signature(type(config).__init__).parameters
    for name, off in SWITCHES.items():
        value = vars(config).get(name)
        if value in (None, off) or name in known or hasattr(type(config), name):
            continue
        raise ValueError(
            f"The configuration has `{name}={value!r}`, which `{type(config).__name__}` does not know: the checkpoint "
            "is of another function than its class computes. Load it with the code that wrote it, or, if the entry "
            f"is a leftover, remove it from config.json."
        )
