"""Saving and resuming: only whole checkpoints, and only those of the same run."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from safetensors import SafetensorError

from ..resuming.checkpoints import resolve_checkpoint
from .record import compare_with


def checkpoint_to_resume(asked_for: str | bool | None, args: Any, record: dict[str, Any]) -> str | None:
    """
    The checkpoint from which a run goes on, or None.

    Args:
        asked_for: `resume_from_checkpoint`; True for the last whole checkpoint.
        args: of the trainer.
        record: of the run that is now, see [`make_record`].

    Raises:
        ValueError: the checkpoint is broken, is of another run, or the run cannot be resumed.
    """
    checkpoint = resolve_checkpoint(asked_for, args.output_dir)
    if not checkpoint:
        return checkpoint
    if getattr(args, "sync_ref_model", False):
        raise ValueError(
            f"`sync_ref_model=True` moves the reference along, and {checkpoint} does not hold it: the run would go "
            "on against the first one. Start anew, without `resume_from_checkpoint`."
        )
    compare_with(checkpoint, record)
    return checkpoint


@contextmanager
def explaining_a_failed_save(step: int, output_dir: str) -> Iterator[None]:
    """Say of an error inside the block what it means for the run."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        raise OSError(
            f"The checkpoint of step {step} could not be written to `output_dir={output_dir!r}`: {error}. Those before "
            "it are untouched. Make room, or the folder writable, and go on with `resume_from_checkpoint=True`, which "
            "passes over the broken one."
        ) from error
