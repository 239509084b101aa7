"""Reward functions in the signature of TRL's GRPO, so that those of `trl.rewards` work as they are."""

import asyncio
import inspect
import math
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import suppress
from functools import partial
from hashlib import blake2b
from numbers import Real
from types import CellType
from typing import Any

RewardFunc = Callable[..., Any]


class Rewards:
    """
    Scores answers with one or several functions, whose rewards are added.

    A function is called as `function(prompts=..., completions=..., completion_ids=..., **columns)`, each a list with
    one entry for each answer. It returns a list of as many numbers, with None where it does not apply, or a coroutine.

    Args:
        functions: one, or a list.
        weights: of each; by default 1.
        cure: what to do when one fails, and what was kept.
    """

    def __init__(
        self,
        functions: RewardFunc | Sequence[RewardFunc],
        weights: Sequence[float] | None = None,
        cure: str = "Answers are kept: correct it and start again.",
    ):
        self._cure = cure
        given = list(functions) if isinstance(functions, Sequence) and not isinstance(functions, str) else [functions]
        self.functions: list[RewardFunc] = given
        for function in given:
            if not callable(function) or hasattr(function, "forward"):
                raise TypeError(
                    f"`reward_funcs` must be functions in the signature of TRL's GRPO, got {function!r}. Wrap a reward "
                    "model in a function that returns a list of numbers."
                )
        if not given:
            raise ValueError("`reward_funcs` is empty: give at least one function.")
        self.weights = [1.0] * len(given) if weights is None else list(weights)
        if len(self.weights) != len(given) or not all(math.isfinite(weight) for weight in self.weights):
            raise ValueError(f"`reward_weights` must be {len(given)} finite numbers, one a function, got {weights}.")

    @property
    def names(self) -> list[str]:
        """Of the functions."""
        return [getattr(function, "__name__", type(function).__name__) for function in self.functions]

    def check_columns(self, columns: Sequence[str]) -> None:
        """Refuse functions that cannot be called with what there will be, before there is any answer."""
        given = ("prompts", "completions", "completion_ids", *columns, *_OF_A_TRAINER)
        for name, function in zip(self.names, self.functions, strict=True):
            try:
                inspect.signature(function).bind(**dict.fromkeys(given))
            except ValueError:  # it has no signature to be asked for
                continue
            except TypeError as error:
                raise ValueError(
                    f"The reward function `{name}` cannot be called: {error}. It is given {', '.join(given)} by name: "
                    "columns that it needs have to be in the dataset, and what it does not need is taken by `**kwargs`."
                ) from error

    def key(self, rows: Any) -> str:
        """A hash of the functions, by their names, sources and the values that they were made with, and of the rows."""
        parts = [(name, _made_of(function)) for name, function in zip(self.names, self.functions, strict=True)]
        return blake2b(repr((parts, rows)).encode(), digest_size=8).hexdigest()

    def __call__(
        self, prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], columns: dict[str, list[Any]]
    ) -> list[list[float | None]]:
        """
        Rewards `[functions][answers]`.

        Raises:
            RuntimeError: a function raises.
            ValueError: it returns something else than as many numbers as there are answers.
        """
        given = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, **columns}
        return [self._ask(*named, given) for named in zip(self.names, self.functions, strict=True)]

    def total(self, rewards: Sequence[float | None]) -> float | None:
        """The weighted sum of the rewards of one answer; None if no function applies."""
        known = [weight * reward for weight, reward in zip(self.weights, rewards, strict=True) if reward is not None]
        return sum(known) if known else None

    def _ask(self, name: str, function: RewardFunc, given: dict[str, Any]) -> list[float | None]:
        try:
            found = function(**given, **_OF_A_TRAINER)
            found = asyncio.run(found) if inspect.iscoroutine(found) else found
        except Exception as error:  # of a user's function
            raise RuntimeError(
                f"The reward function `{name}` raised {type(error).__name__}: {error}. It was called with "
                f"{sorted(given)}. {self._cure}"
            ) from error
        number = len(given["completions"])
        is_array = hasattr(found, "tolist") and getattr(found, "ndim", 1) > 0
        values = list(found) if isinstance(found, Sequence) or is_array else None
        if values is None or len(values) != number:
            what = type(found).__name__ if values is None else f"{len(values)} rewards"
            raise ValueError(
                f"The reward function `{name}` returned {what} for {number} answers. It has to return a list with one "
                f"number, or None, for each. {self._cure}"
            )
        return [_number(value, name, place) for place, value in enumerate(values)]


def _ignore(*args: Any, **kwargs: Any) -> None:
    """For functions that log into a trainer's table."""


# The place of what GRPO passes besides, which has no meaning here
_OF_A_TRAINER = {"trainer_state": None, "log_extra": _ignore, "log_metric": _ignore}


def _number(value: Any, name: str, place: int) -> float | None:
    with suppress(RuntimeError, ValueError):  # of an array of several: said below
        value = value.item() if hasattr(value, "item") else value
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if not isinstance(value, Real) or math.isinf(value):
        raise ValueError(
            f"The reward function `{name}` returned {value!r} for answer {place}, and not a finite number."
        )
    return float(value)


def _made_of(value: Any, depth: int = 4) -> Any:
    """
    What a function is, as a text that another of the same code does not have if it was made with other values: of
    `partial`, of a factory, as defaults, or as attributes. What it calls is not looked at.
    """
    if value is None or isinstance(value, str | bytes | Real):
        return value
    if isinstance(value, Mapping):
        return [(key, _made_of(inner, depth)) for key, inner in value.items()]
    if isinstance(value, Sequence):
        return [_made_of(inner, depth) for inner in value]
    if isinstance(value, Set):
        return sorted(map(repr, value))
    parts = _parts_of(value) if depth else ()
    return (_source(value), [_made_of(part, depth - 1) for part in parts])


def _parts_of(value: Any) -> tuple[Any, ...]:
    if isinstance(value, partial):
        return (value.func, value.args, value.keywords)
    if inspect.ismethod(value):
        return (value.__func__, getattr(value.__self__, "__dict__", {}))
    if inspect.isfunction(value):
        return (value.__defaults__, value.__kwdefaults__, [cell.cell_contents for cell in _filled(value)])
    return (getattr(value, "__dict__", {}),) if callable(value) and not inspect.isclass(value) else ()


def _filled(function: Any) -> list[Any]:
    """Cells of what a function takes from around it; one that is not filled yet has no contents."""
    return [cell for cell in function.__closure__ or () if cell != CellType()]


def _source(value: Any) -> str:
    """Code, or a full name where that cannot be had."""
    kind = value if hasattr(value, "__qualname__") else type(value)
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return f"{kind.__module__}.{kind.__qualname__}"
