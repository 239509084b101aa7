"""
What a start prints and no user can do anything about. Imported and called before TRL, PEFT and transformers are.

Known notices only, each by its full text: another one, or one that was reworded, is seen.
"""

import logging
import re
import warnings

# TRL 1.16 says `gradient_checkpointing` where transformers now says `activation_checkpointing`
_RENAMED = (
    "`gradient_checkpointing` is deprecated and will be removed in v6. Use `activation_checkpointing` instead.",
    "`is_gradient_checkpointing` is deprecated and will be removed in v6. Use `is_activation_checkpointing` instead.",
    "`gradient_checkpointing_enable` is deprecated and will be removed in v6. Use `activation_checkpointing_enable` "
    "instead.",
    "`gradient_checkpointing_disable` is deprecated and will be removed in v6. Use `activation_checkpointing_disable` "
    "instead.",
)
# bitsandbytes, on every import: which kernel it would multiply 4-bit weights with on a CPU
_MISSING_KERNEL = (
    "Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please make sure you already `pip install "
    "kernels` and the kernels >= 0.11.1"
)


def quiet_start() -> None:
    """Leave out, for the rest of the process, what is listed here."""
    for text in _RENAMED:
        warnings.filterwarnings("ignore", message=re.escape(text) + r"\Z", category=FutureWarning)
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_not_the_missing_kernel)


def _is_not_the_missing_kernel(record: logging.LogRecord) -> bool:
    return record.msg != _MISSING_KERNEL
