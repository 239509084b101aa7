"""
Masked diffusion models in lm-evaluation-harness, as its model `trl_diffusion`.

Answers come from the diffusion sampler, log-likelihoods are ELBOs with their standard errors: this module only
translates what the harness asks for. It is imported by the harness alone, which is told of it once it is there.
"""

import logging
import math
from collections.abc import Iterator
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather, gather_object
from datasets import Dataset
from lm_eval.api.model import LM
from tqdm.auto import tqdm

from ..models.chat_template import give_chat_template
from ..models.end_of_text import added_tokens, beginning
from ..models.families import family_of
from ..models.positions import position_limit
from ..models.sampler_arguments import SamplerArguments
from ..scoring.adapters import base_of
from ..scoring.door import ModelConfig, get_quantization_config
from .answers import Answerer
from .greedy import is_greedy
from .likelihood import OPTIONS, Scorer, prepared
from .prompts import Prompts
from .ready import load_ready
from .until import Asked, asked_by
from .windows import Window

logger = logging.getLogger("lm_eval.trl_diffusion")  # the harness shows what goes to its own

_LOADING = ("dtype", "revision", "trust_remote_code", "attn_implementation", "load_in_4bit", "load_in_8bit")
_LIKELIHOOD = tuple(name for name in OPTIONS if name != "seed")  # which the sampler has too
_NOT_ASKED_FOR = {"seed", "num_return_sequences", "return_dict_in_generate"}
_SAMPLER = (*sorted({field.name for field in fields(SamplerArguments)} - _NOT_ASKED_FOR), "eos_token_id")
_ITS_OWN = ("pretrained", "tokenizer", "peft", "batch_size", "device", "seed")


class DiffusionLM(LM):
    """
    The harness's view of a masked diffusion model.

    Args:
        pretrained: path of a model or of an adapter, or a model that is loaded already, with its `tokenizer`.
        tokenizer: of a model that is loaded already.
        peft: path of an adapter to put on the model.
        batch_size: prompts that are answered together.
        device: where to load the model; by default the GPU, if there is one.
        seed: of masks and of the sampler's noise.
        **options: of loading (`dtype`, `load_in_4bit`, ...), of [`~likelihood.likelihood`] and of the sampler. The
            sampler's take precedence over what a task asks for.

    Raises:
        ValueError: an option that is none of these, or a value that does not fit.
    """

    def __init__(
        self,
        pretrained: Any,
        *,
        tokenizer: Any = None,
        peft: str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        seed: int = 0,
        **options: Any,
    ):
        super().__init__()
        _check(options, batch_size, pretrained, tokenizer)
        loading, self._likelihood, self._sampler = (
            {name: options[name] for name in names if name in options} for names in (_LOADING, _LIKELIHOOD, _SAMPLER)
        )
        self._seed, self._batch_size = seed, int(batch_size)
        self._state = PartialState(cpu=device == "cpu" or not torch.accelerator.is_available())
        self._rank, self._world_size = self._state.process_index, self._state.num_processes
        self._device = self._state.device
        if device and self._world_size == 1 and (torch.cuda.is_available() or not device.startswith("cuda")):
            self._device = torch.device(device)  # the harness says "cuda:0" where nobody said anything
        if isinstance(pretrained, str):
            pretrained, tokenizer = load_ready(pretrained, _options(loading, self._device), peft)
        self.model, self.tokenizer = pretrained, tokenizer
        base = base_of(pretrained)
        self.max_length = position_limit(base)
        give_chat_template(tokenizer, family_of(pretrained.config))
        self._before, _ = added_tokens(tokenizer)
        self._errors: list[float] = []

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The ELBO of each continuation given its context, in nats, and whether greedy sampling would write it."""
        rows = [dict(zip(("prompt", "completion"), request.args, strict=True)) for request in requests]
        windows, scorer = self._prepared(Dataset.from_list(rows))
        answers = []
        for request, window, row in zip(requests, windows, self._scored(windows, scorer, disable_tqdm), strict=True):
            ids = torch.tensor([window.ids], device=scorer.model.device)
            answer = (row["nats"], is_greedy(scorer.model, ids, window.begin, scorer.mask_token_id))
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
            answers.append(answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The ELBO of each text, in nats. One that is too long is cut into windows that are scored apart."""
        windows, scorer = self._prepared([request.args[0] for request in requests])
        answers = [0.0] * len(requests)
        for window, row in zip(windows, self._scored(windows, scorer, disable_tqdm), strict=True):
            answers[window.text] += row["nats"]
        if len(windows) > len(requests):
            logger.warning("%d texts were cut into %d windows, scored apart.", len(requests), len(windows))
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return answers

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The sampler's answer to each context, up to the first stop string."""
        asked = [asked_by(request.args[1], self._sampler, self.tokenizer) for request in requests]
        answers, unended = [""] * len(requests), 0
        together = {each: [n for n, other in enumerate(asked) if other == each] for each in asked}
        answerers = {each: self._answerer([requests[n].args[0] for n in of], each) for each, of in together.items()}
        bar = tqdm(total=len(requests), desc="sampling", disable=disable_tqdm or self._rank > 0)
        for each, answerer in answerers.items():
            for place, text, is_ended in self._answers(answerer, each):
                number = together[each][place]
                answers[number], unended = text, unended + (not is_ended)
                self.cache_hook.add_partial("generate_until", requests[number].args, text)
                bar.update()
        bar.close()
        if unended:
            message = "%d of %d answers fill their canvas and have neither an end of text nor a stop string."
            logger.warning(message, unended, len(requests))
        return answers

    def _prepared(self, texts: Any) -> tuple[list[Window], Scorer]:
        return prepared(self.model, self.tokenizer, texts, **OPTIONS | self._likelihood | {"seed": self._seed})

    def _scored(self, windows: list[Window], scorer: Scorer, disable_tqdm: bool) -> Iterator[dict[str, Any]]:
        """Rows of windows, whose standard errors are kept and summed up in the end."""
        errors = []
        for row in map(scorer, tqdm(windows, desc="scoring", disable=disable_tqdm or self._rank > 0)):
            errors.append(row["standard_error"])
            yield row
        self._errors += errors
        mean, most = sum(errors) / len(errors), max(errors)
        logger.info("%d log-likelihoods, standard error %.3g nats, at most %.3g.", len(errors), mean, most)

    def _answerer(self, contexts: list[str], asked: Asked) -> Answerer:
        ids = [beginning(text, self.tokenizer, self._before) for text in contexts]
        empty = next((number for number, each in enumerate(ids) if not each), None)
        if empty is not None:
            raise ValueError(f"Context {empty} of the task has no token, and the sampler needs a prompt.")
        prompts = Prompts([{"prompt": text} for text in contexts], ids, conversational=False)
        return Answerer(self.model, self.tokenizer, prompts, 1, self._seed, dict(asked.arguments))

    def _answers(self, answerer: Answerer, asked: Asked) -> Iterator[tuple[int, str, bool]]:
        """Number, text, and whether it ended before its canvas did; prompts of about one length together."""
        numbers = sorted(range(len(answerer.prompts.ids)), key=lambda number: -len(answerer.prompts.ids[number]))
        for batch in answerer.batches(numbers, self._batch_size):
            for number, (ids,) in zip(batch, answerer(batch), strict=True):
                kept = asked.before_stop_tokens(ids)
                text, is_stopped = asked.before_stop_strings(answerer.text(number, kept))
                yield number, text, is_stopped or len(kept) < answerer.max_new_tokens

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation, with an opened turn or with a last message that goes on."""
        if self.tokenizer.chat_template is None:
            raise ValueError("The tokenizer has no chat template: leave `--apply_chat_template` out, or set one.")
        options = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        return self.tokenizer.apply_chat_template(chat_history, tokenize=False, **options)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.tokenizer.chat_template if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        """For the harness's cache of requests."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside the results: how numbers were made, and how sure they are."""
        made: dict[str, Any] = {"seed": self._seed, "likelihood": self._likelihood, "sampler": self._sampler}
        known = [error for error in self._errors if not math.isnan(error)]
        if known:
            made |= {"standard_error_nats_mean": sum(known) / len(known), "standard_error_nats_max": max(known)}
        return made

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Of all processes."""
        return gather(tensor)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Of all processes, for one of them."""
        gathered = gather_object([obj])
        return gathered if self._rank == dst else None

    def barrier(self) -> None:
        """Wait for all processes."""
        self._state.wait_for_everyone()


def _check(options: dict[str, Any], batch_size: Any, pretrained: Any, tokenizer: Any) -> None:
    """Refuse what has no meaning, before a model is loaded."""
    known = [*_ITS_OWN, *_LOADING, *_LIKELIHOOD, *_SAMPLER]
    for name, value in options.items():
        if name not in known:
            nearest = get_close_matches(name, known, n=1)
            hint = f"Did you mean `{nearest[0]}`?" if nearest else f"The arguments are {sorted(known)}."
            raise ValueError(f"`{name}={value}` in `--model_args` is not an argument of `trl_diffusion`. {hint}")
    if not str(batch_size).isdigit() or int(batch_size) < 1:
        raise ValueError(
            f"`--batch_size {batch_size}` must be a number of prompts, 8 for instance; `auto` is not there."
        )
    is_loaded = not isinstance(pretrained, str)
    if is_loaded != (tokenizer is not None):
        raise ValueError("`tokenizer` goes with a `pretrained` that is loaded already; that of a path is beside it.")
    if is_loaded and (given := [name for name in _LOADING if name in options]):
        raise ValueError(f"`{given[0]}` says how to load a model, and `pretrained` is loaded already: leave it out.")


def _options(loading: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Those of `from_pretrained`."""
    quantised = {name: loading.pop(name) for name in ("load_in_4bit", "load_in_8bit") if name in loading}
    options = {"dtype": "bfloat16" if any(quantised.values()) else "auto", **loading}
    if any(quantised.values()):
        options["quantization_config"] = get_quantization_config(ModelConfig(dtype=options["dtype"], **quantised))
    return {**options, "device_map": None if device.type == "cpu" else {"": device}}
