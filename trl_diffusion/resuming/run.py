"""What a trainer does about checkpoints: which one it goes on from, and what it adds to those that it saves."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model

from .checkpoints import RUN, record_of, resolve_checkpoint, seal
from .record import compare

_REFERENCE = "reference.safetensors"


def checkpoint_to_resume(trainer: Any, given: str | bool | None, record: dict[str, Any]) -> str | None:
    """
    The checkpoint to go on from, after it was compared; a reference that moved is put where it was.

    Args:
        trainer: which has not begun to train.
        given: `resume_from_checkpoint`, see [`resolve_checkpoint`].
        record: of the trainer, see [`make_record`].

    Raises:
        ValueError: the checkpoint is broken, of another run, or lacks the reference.
    """
    checkpoint = resolve_checkpoint(given, trainer.args.output_dir)
    if checkpoint is None:
        return None
    compare(record_of(checkpoint), record, trainer.args.differences, checkpoint)
    if record["sync_ref_model"]:
        if not (Path(checkpoint) / _REFERENCE).exists():
            raise ValueError(
                f"`sync_ref_model=True` moves the reference along, and {checkpoint} does not hold it, as it was "
                "sharded: the run would go on against the first one. Start anew, without `resume_from_checkpoint`."
            )
        load_model(trainer.accelerator.unwrap_model(trainer.ref_model), Path(checkpoint) / _REFERENCE)
    return checkpoint


def finish_checkpoint(trainer: Any, folder: str, record: dict[str, Any]) -> None:
    """Add what transformers does not save, once every process has written its part of a checkpoint."""
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if trainer.args.should_save and record["sync_ref_model"] and not sharded:
        save_model(trainer.accelerator.unwrap_model(trainer.ref_model), str(Path(folder) / _REFERENCE))
    trainer.accelerator.wait_for_everyone()
    if trainer.args.should_save:
        seal(folder, record)


def load_best_adapter(trainer: Any) -> bool:
    """
    Load the best adapter of a run, where it is not called "default". Returns whether it was.

    PEFT saves such a one in a folder of its own, in which transformers does not look at the end.
    """
    name = trainer.model.active_adapters[0] if is_peft_model(trainer.model) else "default"
    folder = Path(trainer.state.best_model_checkpoint) / name
    if name == "default" or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or not folder.is_dir():
        return False
    trainer.model.load_adapter(str(folder), name)
    return True


@contextmanager
def saving_a_checkpoint(folder: Path) -> Iterator[None]:
    """Until it is finished a checkpoint is none, also over one of the same step. Say of a failure what it means."""
    try:
        (folder / RUN).unlink(missing_ok=True)
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        raise OSError(
            f"{folder.name} could not be written to `output_dir={str(folder.parent)!r}`: {error}. Those before it are "
            "untouched. Make room, or the folder writable, and go on with `resume_from_checkpoint=True`, which passes "
            "over the broken one."
        ) from error
