"""What a task of lm-evaluation-harness asks a sampler for: its arguments, and where an answer stops."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

_CANVAS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # one thing, as tasks call it
_OF_NOISE = ("top_p", "top_k", "min_p")  # change nothing of a greedy answer
_CANVAS_BY_DEFAULT = 256  # the harness's


@dataclass(frozen=True)
class Asked:
    """
    Args:
        arguments: of the sampler, in pairs.
        stop_strings: an answer ends before the first of them.
        stop_tokens: those of them that are tokens: decoding may leave these out.
    """

    arguments: tuple[tuple[str, Any], ...]
    stop_strings: tuple[str, ...]
    stop_tokens: frozenset[int]

    def before_stop_tokens(self, ids: list[int]) -> list[int]:
        """An answer up to where a token says stop."""
        return ids[: next((i for i, token in enumerate(ids) if token in self.stop_tokens), len(ids))]

    def before_stop_strings(self, text: str) -> tuple[str, bool]:
        """A text up to the first stop string, and whether there is one."""
        end = min((place for stop in self.stop_strings if (place := text.find(stop)) >= 0), default=-1)
        return (text[:end], True) if end >= 0 else (text, False)


def asked_by(task: Mapping[str, Any], chosen: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Asked:
    """
    Args:
        task: what the harness gives with a request.
        chosen: arguments of the sampler that the user has set, which take precedence.
        tokenizer: of the model.
    """
    given = dict(task)
    until = given.pop("until", None) or []
    stops = tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop)
    canvas = next((int(size) for name in _CANVAS if (size := given.pop(name, None)) is not None), _CANVAS_BY_DEFAULT)
    if "temperature" in chosen:
        given.pop("do_sample", None)
    if not given.get("do_sample"):
        given = {name: value for name, value in given.items() if name not in _OF_NOISE}
    arguments = {"max_new_tokens": canvas, **given, **chosen}
    pairs = sorted((name, tuple(value) if isinstance(value, list) else value) for name, value in arguments.items())
    vocabulary = tokenizer.get_vocab()
    return Asked(tuple(pairs), stops, frozenset(vocabulary[stop] for stop in stops if stop in vocabulary))
