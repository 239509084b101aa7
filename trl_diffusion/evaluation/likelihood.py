"""
The likelihood of texts: a Monte Carlo estimate of their ELBO with its error, or the chain rule in one order.

By the chain rule, with s a permutation of the N tokens that are scored,

    log p_s(x) = sum_j log p(x_s(j) | x_s(1), ..., x_s(j-1)),

in which everything that comes later in s is masked. It is a likelihood for every s, exact, and costs N forwards. The
ELBO is the mean of these over all s (RADD, arXiv 2406.03736), estimated in any number of forwards. Both are sums over
masks that the head scores: those of the chain rule have no randomness but that of s. Under a block diffusion model both
hold in each block, given the clean ones before it, and the log-likelihood is their sum: s is an order within blocks.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..checks.datasets import unformatted
from ..estimators.draws import MaskDraws, draw_masks
from ..estimators.elbo import elbo
from ..models.denoiser import check_denoiser, evaluating, resolve_mask_token_id
from ..models.families import blocks_of, family_of
from ..models.positions import position_limit
from ..scoring.adapters import base_of
from ..scoring.door import hash_module
from ..scoring.head import ELBOHead, draws_at_hand
from ..scoring.key import scoring_key
from ..scoring.responses import cut
from .exact import ORDERS, chain_rule, every_mask
from .guidance import check_guidance, guided
from .ledger import Ledger, processes_of
from .perplexity import Likelihood
from .windows import Window, windows_of

# RADD's losses as Monte Carlo estimates of the ELBO: t-DCE, in the noise level of a time t, is lambda-DCE in the
# probability lambda(t) that a token is hidden; k-DCE is in the number of hidden tokens
_BY_LEVEL = {"scheme": "bernoulli", "stratify": True, "control_variate": "none"}
_BY_COUNT = {"scheme": "fixed_count", "stratify": False, "control_variate": "none"}
LOSSES = {"t_dce": _BY_LEVEL, "lambda_dce": _BY_LEVEL, "k_dce": _BY_COUNT}
METHODS = ("elbo", "chain_rule", *LOSSES)


def likelihood(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    texts: Any,
    *,
    method: str = "elbo",
    order: str = "left_to_right",
    num_mc_samples: int = 128,
    mask_scheme: str = "mirror",
    stratify: bool = True,
    control_variate: str = "leave_one_out",
    cfg_scale: float = 0.0,
    max_length: int | None = None,
    draws_per_forward: int | None = None,
    seed: int = 0,
    output_dir: str | None = None,
) -> Likelihood:
    """
    Score texts, or completions given their prompts.

    Args:
        model: a masked diffusion model, with an adapter or without.
        tokenizer: its own.
        texts: a dataset with a column `text`, or with `prompt` and `completion`, of which the completion is scored; or
            a list of texts. Texts are scored whole, from their first token on.
        method: `"elbo"`, or `"chain_rule"`; or the ELBO by one of RADD's losses, `"t_dce"`, `"lambda_dce"` and
            `"k_dce"`, which say themselves how masks are drawn.
        order: of the chain rule; `"random"` draws one for each text from `seed`.
        num_mc_samples: draws for each text. By `"elbo"` a text of so few tokens that there are no more masks is scored
            under each of them, exactly.
        mask_scheme, stratify, control_variate: how masks are drawn, as in the trainers.
        cfg_scale: strength w of unsupervised classifier-free guidance (SMDM, arXiv 2410.18514), as in the sampler: the
            likelihood is that of  (1 + w) * logits - w * logits where the prompt is hidden.  0 is off; otherwise texts
            need prompts, and each draw costs two forwards.
        max_length: tokens that are scored together; by default as many as the model has positions for. A longer text is
            cut into windows, each of which is scored by itself. A prompt is never cut.
        draws_per_forward: masks that run through the model together.
        seed: of the masks.
        output_dir: where finished rows are kept; the same call goes on from there.

    Returns:
        [`Likelihood`].

    Raises:
        ValueError: values that do not fit, no texts, one without a token or with the mask token, a prompt that leaves
            no room, or a folder with rows of another run.
    """
    windows, scorer = prepared(
        model,
        tokenizer,
        texts,
        method=method,
        order=order,
        num_mc_samples=num_mc_samples,
        mask_scheme=mask_scheme,
        stratify=stratify,
        control_variate=control_variate,
        cfg_scale=cfg_scale,
        max_length=max_length,
        draws_per_forward=draws_per_forward,
        seed=seed,
    )
    if output_dir is None:
        return Likelihood.of([scorer(window) for window in tqdm(windows, desc="scoring")])
    function = scoring_key(model, scorer.mask_token_id, "no")
    key = {"model": hash_module(model), "function": function, "texts": _hash(windows), **scorer.drawing}
    key |= {"cfg_scale": cfg_scale} if cfg_scale else {}
    return Likelihood.of(_kept(windows, scorer, key, Path(output_dir)))


def prepared(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    texts: Any,
    *,
    method: str,
    order: str,
    num_mc_samples: int,
    mask_scheme: str,
    stratify: bool,
    control_variate: str,
    cfg_scale: float,
    max_length: int | None,
    draws_per_forward: int | None,
    seed: int,
) -> tuple[list[Window], "Scorer"]:
    """What [`likelihood`] scores, and with what; all of its arguments are said."""
    drawing = _drawing(method, order, seed)
    scheme = {"scheme": mask_scheme, "stratify": stratify, "control_variate": control_variate}
    by_default = {name: OPTIONS[name] for name in ("mask_scheme", "stratify", "control_variate")}
    if method != "elbo" and [*scheme.values()] != [*by_default.values()]:
        raise ValueError(
            f"`method={method!r}` says itself how masks are drawn: leave `mask_scheme`, `stratify` and "
            f"`control_variate` out, got {scheme}."
        )
    for name, value in {"max_length": max_length, "draws_per_forward": draws_per_forward}.items():
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"`{name}` must be None or a whole number of at least 1, got {value!r}.")
    for name, value in {"num_mc_samples": num_mc_samples, "seed": seed}.items():
        if not isinstance(value, int):
            raise ValueError(f"`{name}` must be a whole number, got {value!r}.")
    if method != "chain_rule":
        drawing |= {"num_mc_samples": num_mc_samples, **LOSSES.get(method, scheme)}
    facts = {"drawing": drawing, "cfg_scale": cfg_scale, "enumerates": method == "elbo"}
    scorer = Scorer.of(model, tokenizer, draws_per_forward, **facts)
    limits = [limit for limit in (max_length, position_limit(scorer.model)) if limit is not None]
    longest = min(limits, default=None)
    return windows_of(_rows(texts), tokenizer, scorer.mask_token_id, longest, scorer.first_is_shown), scorer


# The options of a likelihood, and what they are unless something else is said
OPTIONS = {name: value for name, value in (likelihood.__kwdefaults__ or {}).items() if name != "output_dir"}


def _drawing(method: str, order: str, seed: int) -> dict[str, Any]:
    if method not in METHODS or order not in ORDERS:
        raise ValueError(f"`method` must be one of {METHODS}, `order` one of {ORDERS}, got {method!r} and {order!r}.")
    if method != "chain_rule" and order != OPTIONS["order"]:
        raise ValueError(f"`order={order!r}` is for `method='chain_rule'`, and `method` is {method!r}: leave it out.")
    return {"order": order, "seed": seed} if method == "chain_rule" else {"seed": seed}


@dataclass(frozen=True)
class Scorer:
    """
    Scores windows.

    Args:
        model: below its adapter.
        mask_token_id: the mask token.
        draws_per_forward: masks that run together.
        drawing: how masks are drawn; with an `order` by the chain rule.
        cfg_scale: strength of guidance by the prompt.
        enumerates: whether a window that has no more masks than draws is scored under all of them, and so exactly.
    """

    model: Any
    mask_token_id: int
    draws_per_forward: int | None
    drawing: dict[str, Any]
    cfg_scale: float = 0.0
    enumerates: bool = False

    @classmethod
    def of(cls, model: Any, tokenizer: Any, draws_per_forward: int | None, **facts: Any) -> "Scorer":
        base = base_of(model)
        mask_token_id = resolve_mask_token_id(base.config, tokenizer)
        check_denoiser(base, mask_token_id)
        check_guidance(base.config, facts["cfg_scale"])
        return cls(base, mask_token_id, draws_per_forward, **facts)

    @property
    def first_is_shown(self) -> bool:
        family = family_of(self.model.config)
        return bool(family.logit_shift) and family.first_token == "nothing"

    def __call__(self, window: Window) -> dict[str, Any]:
        """The row of a window."""
        with evaluating(self.model), torch.no_grad():
            return self._row(window)

    def _row(self, window: Window) -> dict[str, Any]:
        ids = torch.tensor([window.ids], device=self.model.device)
        maskable = torch.arange(len(window.ids), device=ids.device)[None] >= window.begin
        real = torch.ones_like(maskable)
        blocks = blocks_of(self.model.config, maskable, real)
        draws, is_exact = self._draws(window, ids, maskable, blocks)
        if self.cfg_scale:
            denoiser = guided(self.model, ~maskable, self.cfg_scale, self.mask_token_id)
            out = elbo(denoiser, ids, maskable, draws=draws, mask_token_id=self.mask_token_id)
        else:
            head = ELBOHead(draws_at_hand, self.mask_token_id, self.draws_per_forward)
            responses = cut(ids, real, draws, self.draws_per_forward, blocks)
            out = head.score(self.model, responses, maskable, draws)
        error = 0.0 if is_exact else out.standard_error.item()
        size = {"tokens": len(window.ids) - window.begin, "bytes": window.bytes}
        return {"nats": out.value.double().item(), "standard_error": error, **size}

    def _draws(
        self, window: Window, ids: torch.Tensor, maskable: torch.Tensor, blocks: torch.Tensor | None
    ) -> tuple[MaskDraws, bool]:
        """Masks of a window, and whether what they say has no error."""
        if "order" in self.drawing:
            return chain_rule(maskable, nonce=window.number, blocks=blocks, **self.drawing), True
        draws = draw_masks(  # which refuses what is no scheme
            maskable, rows=ids, blocks=blocks, nonce=window.occurrence, **self.drawing
        )
        if self.enumerates and blocks is None and 2 ** int(maskable.sum()) - 1 <= draws.num_mc_samples:
            return every_mask(maskable), True
        return draws, False


def _kept(windows: list[Window], score: Scorer, key: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Rows of all windows, each scored by one process and kept."""
    state = processes_of(score.model)
    ledger = Ledger(folder, "likelihood", key, state.process_index)
    state.wait_for_everyone()
    mine = windows[state.process_index :: state.num_processes]
    for window in tqdm(mine, desc="scoring", disable=not state.is_main_process):
        if window.number not in ledger.rows:
            ledger.add(window.number, **score(window))
    state.wait_for_everyone()
    ledger.read()
    return [ledger.rows[window.number] for window in windows]


def _rows(texts: Any) -> list[dict[str, str]]:
    if isinstance(texts, Dataset):
        texts = unformatted(texts, "text")
        names = next((each for each in (["prompt", "completion"], ["text"]) if {*each} <= {*texts.column_names}), None)
        if names is None:
            raise ValueError(
                f"`texts` has the columns {texts.column_names}, and needs `text`, or `prompt` and `completion`."
            )
        rows = texts.select_columns(names).to_list()
    elif isinstance(texts, Iterable) and not isinstance(texts, str | dict | IterableDataset):
        rows = [{"text": text} for text in texts]
    else:
        raise TypeError(f"`texts` must be a `Dataset` or a list of texts, got `{type(texts).__name__}`.")
    for number, row in enumerate(rows):
        other = next((name for name, value in row.items() if not isinstance(value, str)), None)
        if other:
            raise ValueError(
                f"`{other}` of text {number} is no text but {str(row[other])[:60]!r}. Give texts; messages are written "
                "as one by `tokenizer.apply_chat_template(messages, tokenize=False)`, and rows are made a dataset by "
                "`Dataset.from_list(rows)`."
            )
    return rows


def _hash(windows: list[Window]) -> str:
    return blake2b(repr([(w.ids, w.begin) for w in windows]).encode(), digest_size=16).hexdigest()
