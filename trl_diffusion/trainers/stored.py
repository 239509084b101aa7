"""
Reference values on disk: a file for each part of a dataset on one set of draws, beside the rows.

A file says under which key its values were computed, and has a hash of them. One that is damaged, or of another key, is
computed again.
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
from accelerate.logging import get_logger
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

logger = get_logger(__name__)

FORMAT = 1  # of the files; raise it when what they hold means something else
Values = dict[str, np.ndarray]


def place_for(dataset: Dataset, key: str) -> Path | None:
    """Where the values of these rows under this key are; None for rows in memory."""
    if not dataset.cache_files:
        return None
    name = _digest(f"{FORMAT} {key}")[:32]
    return Path(dataset.cache_files[0]["filename"]).parent / f"reference-values-{name}.safetensors"


def read(path: Path | None, key: str, rows: int, label: str) -> Values | None:
    """What was stored, or None; warns of a file that cannot be used."""
    if path is None or not path.exists():
        return None
    try:
        with safe_open(path, "numpy") as file:
            values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            about = file.metadata() or {}
    except (OSError, SafetensorError):
        values, about = {}, {}
    whole = all(value.shape == (rows,) and np.isfinite(value).all() for value in values.values())
    if values and whole and about == _about(key, values):
        return values
    logger.warning("Stored reference values of the %s dataset are damaged and computed again.", label)
    return None


def write(path: Path | None, key: str, values: Values, label: str) -> None:
    """Store values; a file is there whole or not at all."""
    if path is None:
        return
    unfinished = path.with_suffix(f".{os.getpid()}")
    try:
        save_file(values, unfinished, metadata=_about(key, values))
        unfinished.replace(path)
    except (OSError, SafetensorError) as error:
        unfinished.unlink(missing_ok=True)
        logger.warning(
            "Reference values of the %s dataset could not be stored (%s), and will be computed again by the next run. "
            "Make room in %s, or make it writable.",
            *(label, error, path.parent),
        )


def _about(key: str, values: Values) -> dict[str, str]:
    content = hashlib.sha256(json.dumps({name: str(values[name].dtype) for name in sorted(values)}).encode())
    for name in sorted(values):
        content.update(values[name].tobytes())
    return {"format": str(FORMAT), "key": _digest(key), "content": content.hexdigest()}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
