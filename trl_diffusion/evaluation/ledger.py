"""
Rows that were computed, kept in files of JSON lines: an interrupted run goes on where it stopped.

Each process appends to a file of its own and reads those of all, so that a run may go on with another number of
processes. The first line of a file says what its rows depend on; rows of another run are refused by what differs.
"""

import json
from pathlib import Path
from typing import Any

from accelerate import PartialState

FORMAT = 1  # of the files; raise it when what they hold means something else


class Ledger:
    """
    Args:
        folder: of the files.
        name: what they begin with.
        key: what the rows depend on, by name: values that JSON can hold.
        process: number of this one.

    Attributes:
        rows: by number, of all processes.

    Raises:
        ValueError: the folder has rows of another run, or a file that is not one of these.
    """

    def __init__(self, folder: str | Path, name: str, key: dict[str, Any], process: int = 0):
        self.rows: dict[int, dict[str, Any]] = {}
        self._name, self._folder = name, Path(folder)
        self._key = json.loads(json.dumps({"format": FORMAT, **key}))
        self._path = self._folder / f"{name}-{process:05d}.jsonl"
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._path.exists():
            self._cut_what_was_not_finished()
        if not self._path.exists() or not self._path.stat().st_size:
            self._append(self._key)
        self.read()

    def read(self) -> None:
        """Take up what other processes have written since."""
        for path in sorted(self._folder.glob(f"{self._name}-*.jsonl")):
            head, *rows = self._lines(path) or [self._key]
            self._compare(head, path)
            self.rows |= {row["number"]: row for row in rows}

    def add(self, number: int, **values: Any) -> None:
        """Keep a row; it is in the file when this returns."""
        self.rows[number] = {"number": number, **values}
        self._append(self.rows[number])

    def _append(self, row: dict[str, Any]) -> None:
        with open(self._path, "a") as file:
            file.write(json.dumps(row) + "\n")

    def _cut_what_was_not_finished(self) -> None:
        content = self._path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            self._path.write_bytes(whole)

    @staticmethod
    def _lines(path: Path) -> list[dict[str, Any]]:
        lines = path.read_text().split("\n")[:-1]  # without one that another process is writing
        try:
            return [json.loads(line) for line in lines]
        except ValueError as error:
            raise ValueError(f"{path} has a line that is not JSON ({error}). Remove the file to start anew.") from error

    def _compare(self, head: dict[str, Any], path: Path) -> None:
        names = [name for name in {**head, **self._key} if head.get(name) != self._key.get(name)]
        if names:
            said = ", ".join(f"`{n}` was {_short(head.get(n))} and is {_short(self._key.get(n))}" for n in names)
            raise ValueError(
                f"{path} is of another run: {said}. Go on with what it was begun with, or give another `output_dir`."
            )


def processes_of(model: Any) -> PartialState:
    """The processes that share the work; one, unless a launcher has started several."""
    return PartialState(cpu=next(model.parameters()).device.type == "cpu")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
