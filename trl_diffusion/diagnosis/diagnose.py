"""
How noisy the preference score is on the user's own model and data, and which estimator and K to take.

The protocol is that of VRPO (arXiv 2505.19223, section 4.3): repeated estimates of the scores of some pairs. Here every
pair is scored once, on many stratified mirror pairs, and the repeats of all estimators are read off these scores
(`variance_analysis.py`).
"""

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from tqdm.auto import tqdm

from ..estimators.control_variate import ControlVariate
from ..estimators.draws import MaskSampler
from ..estimators.hashing import hash_rows
from ..estimators.variance import Scored, fixed_count_repeats, fixed_count_samples, repeats, variance_parts
from ..scoring.adapters import refuse_changed_base
from ..scoring.door import hash_module
from ..scoring.head import FIXED_NONCE
from ..trainers.vrpo.config import DiffusionVRPOConfig
from ..trainers.vrpo.trainer import DiffusionVRPOTrainer
from .report import DRAW_COUNTS, ESTIMATORS, VarianceReport


def diagnose_variance(
    model: Any,
    ref_model: Any = None,
    dataset: Any = None,
    args: DiffusionVRPOConfig | None = None,
    *,
    processing_class: Any = None,
    peft_config: Any = None,
    quantization_config: Any = None,
    num_pairs: int = 16,
    num_draws: int = 64,
    target_standard_error: float = 0.5,
) -> VarianceReport:
    """
    Measure the noise of the preference score on a model and a preference dataset, and recommend an estimator.

    Costs `num_pairs * 2 * num_draws` forwards of the policy and of the reference, no backward. Finished pairs are kept
    in `variance.jsonl` in `args.output_dir`, under the weights, the tokens and the draws, and not scored again.

    Args:
        model: as in [`DiffusionVRPOTrainer`]. The reference of a model with an adapter is the model without it. A model
            that has neither an adapter nor a `ref_model` is its own reference.
        ref_model: as in [`DiffusionVRPOTrainer`].
        dataset: preference dataset; the first `num_pairs` rows are used.
        args: configuration; its options of the estimator are not used, those of the data and the memory are.
        processing_class: as in [`DiffusionVRPOTrainer`].
        peft_config: as in [`DiffusionVRPOTrainer`].
        quantization_config: as in [`DiffusionVRPOTrainer`].
        num_pairs: pairs to score.
        num_draws: draws of each response, a multiple of 32 and at least 32.
        target_standard_error: of the score. At 0.5 the noise biases the loss by less than 0.5^2 / 8 = 0.03.

    Returns:
        [`VarianceReport`].

    Raises:
        ValueError: no dataset, fewer than two pairs, or a number of draws that cannot be dealt out.
    """
    _check(dataset, num_pairs, num_draws)
    args = _with_many_draws(args or DiffusionVRPOConfig("variance"), num_draws)
    has_adapter = not isinstance(model, str) and is_peft_model(model)
    if has_adapter and ref_model is None:
        for config in model.peft_config.values():
            refuse_changed_base(config, "Pass that one as `ref_model`.")
    fresh = ref_model is None and peft_config is None and not has_adapter
    trained = [] if isinstance(model, str) else [p for p in model.parameters() if p.requires_grad]
    trainer = DiffusionVRPOTrainer(
        model,
        ref_model,
        args,
        train_dataset=_first_rows(dataset, num_pairs),
        processing_class=processing_class,
        peft_config=LoraConfig(r=1) if fresh else peft_config,  # an adapter that is zero, so that nothing is copied
        quantization_config=quantization_config,
    )
    if has_adapter and "ref" in trainer.model.peft_config:
        trainer.model.delete_adapter("ref")  # TRL's copy of the adapter, from which training would start
    rows = _score_pairs(trainer, args.mask_sampler(), Path(args.output_dir) / "variance.jsonl")
    if not isinstance(model, str) and not has_adapter and is_peft_model(trainer.model):
        trainer.model.unload()  # the adapter that was made here; PEFT has frozen everything else
        for parameter in trained:
            parameter.requires_grad_(True)
    return _report(rows, num_draws, args.beta, target_standard_error)


def _check(dataset: Any, num_pairs: int, num_draws: int) -> None:
    if num_pairs < 2:
        raise ValueError(f"`num_pairs` must be at least 2, for a spread over pairs, got {num_pairs}.")
    if num_draws < 32 or num_draws % 32:
        raise ValueError(f"`num_draws` must be a multiple of 32, got {num_draws}. The default is 64.")
    if dataset is None:
        raise ValueError("`dataset` is missing: give a preference dataset, of which a few pairs are scored.")


def _with_many_draws(args: DiffusionVRPOConfig, num_draws: int) -> DiffusionVRPOConfig:
    """The draws of all estimators can be picked from stratified mirror pairs that chosen and rejected share."""
    args = copy.copy(args)
    args.num_mc_samples, args.mask_scheme, args.stratify, args.couple_pairs = num_draws, "mirror", True, True
    args.control_variate, args.share_draws, args.precompute_ref_log_probs = "none", True, False
    return args


def _first_rows(dataset: Any, number: int) -> Any:
    """As a dataset; what is not one is refused by the trainer."""
    if isinstance(dataset, IterableDataset):
        return Dataset.from_list(list(dataset.take(number)))
    return dataset.select(range(min(number, len(dataset)))) if isinstance(dataset, Dataset) else dataset


def _score_pairs(trainer: DiffusionVRPOTrainer, sampler: MaskSampler, path: Path) -> list[dict[str, Any]]:
    """One row of numbers for each pair, from the file where it is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_text().splitlines() if path.exists() else []
    done = {row["key"]: row for row in map(_parse, lines) if row}
    unwrapped = trainer.accelerator.unwrap_model(trainer.model)
    models = [unwrapped] if trainer.ref_model is None else [unwrapped, trainer.ref_model]
    scorers = [(hash_module(model), trainer._scoring_settings(model)) for model in models]
    rows = []
    trainer.model.eval()
    for example in tqdm(trainer.train_dataset, desc="scoring pairs"):
        inputs = trainer._prepare_inputs(trainer.data_collator([example]))
        content = hash_rows(inputs["input_ids"] * 2 + inputs["completion_mask"], inputs["attention_mask"].bool())
        key = str((content.tolist(), scorers, sampler.key))
        if key not in done:
            done[key] = {"key": key, **_measure(*_score_pair(trainer, sampler, inputs))}
            with open(path, "a") as file:
                file.write(json.dumps(done[key]) + "\n")
        rows.append(done[key])
    return rows


def _parse(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None  # cut off while it was written: that pair is scored again


def _score_pair(trainer: DiffusionVRPOTrainer, sampler: MaskSampler, inputs: dict[str, Any]) -> tuple[Any, ...]:
    """Chosen and rejected, scored; their tokens; and whether the policy differs from its reference."""
    maskable = inputs["completion_mask"].bool()
    labels = inputs["input_ids"].masked_fill(~maskable, -100)
    arguments = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "labels": labels}
    with trainer._diagnostics.collecting() as outputs, torch.no_grad():
        with trainer.accelerator.autocast():
            trainer.model(**arguments, fused_lm_head=True, draw_nonce=FIXED_NONCE)
        trainer.compute_ref_log_probs(partial(trainer.ref_model or trainer.model, draw_nonce=FIXED_NONCE), inputs)
    policy, reference = (output.elbo.log_probs for output in outputs if output.elbo)
    differs = not torch.equal(policy, reference)
    values = (policy - reference if differs else policy).cpu()
    masked = sampler(maskable, inputs["input_ids"], inputs["attention_mask"], FIXED_NONCE).masked.cpu()
    maskable = maskable.cpu()
    scored = [Scored(masked[:, b, maskable[b]], values[:, b, maskable[b]]) for b in (0, 1)]
    tokens = [inputs["input_ids"][b].cpu()[maskable[b]].tolist() for b in (0, 1)]
    return *scored, tokens, differs


def _measure(chosen: Scored, rejected: Scored, tokens: list[list[int]], differs: bool) -> dict[str, Any]:
    """What is kept of a pair: plain numbers, in nats."""
    same = sum(a == b for a, b in zip(*tokens, strict=False))
    parts = [variance_parts(scored) for scored in (chosen, rejected)]
    margin = (fixed_count_samples(chosen).mean() - fixed_count_samples(rejected).mean()).item()
    variance = {
        f"{name}|{count}": _variance(name, count, chosen, rejected)
        for name in ESTIMATORS
        for count in DRAW_COUNTS
        if count < len(chosen.masked) // 2
    }
    return {
        "differs": differs,
        "overlap": same / max(map(len, tokens)),
        "margin": margin,
        "parts": {part: sum(each[part] for each in parts) for part in parts[0]},
        "variance": variance,
    }


def _variance(name: str, count: int, chosen: Scored, rejected: Scored) -> float:
    """Of the difference of the two estimates. Coupled: on the same draws; else on draws that are far apart."""
    if name == "VRPO paper":
        return sum(fixed_count_samples(scored).var().item() for scored in (chosen, rejected)) / count
    if name == "fixed counts":
        values = [fixed_count_repeats(scored, count) for scored in (chosen, rejected)]
    else:
        control = ControlVariate() if ESTIMATORS[name]["control_variate"] == "leave_one_out" else None
        values = [repeats(scored, count, control) for scored in (chosen, rejected)]
    if not ESTIMATORS[name]["couple_pairs"]:
        return sum(value.var().item() for value in values)
    return (values[0] - values[1]).var().item()


def _report(rows: list[dict[str, Any]], num_draws: int, beta: float, target: float) -> VarianceReport:
    if len(rows) < 2:
        raise ValueError(f"{len(rows)} pairs are left of the dataset, and a spread over pairs needs two. Give more.")
    cells = {tuple(cell.split("|")): [row["variance"][cell] for row in rows] for cell in rows[0]["variance"]}
    variance, error = {}, {}
    for (name, count), values in cells.items():
        of_pairs = beta**2 * torch.tensor(values, dtype=torch.float64)
        variance[name, int(count)] = of_pairs.mean().item()
        error[name, int(count)] = of_pairs.std().item() / len(rows) ** 0.5
    parts = {part: sum(row["parts"][part] for row in rows) for part in rows[0]["parts"]}
    margins = beta * torch.tensor([row["margin"] for row in rows])
    return VarianceReport(
        num_pairs=len(rows),
        num_draws=num_draws,
        beta=beta,
        compares_with_reference=any(row["differs"] for row in rows),
        overlap=sum(row["overlap"] for row in rows) / len(rows),
        margin=margins.mean().item(),
        margin_spread=margins.std().item(),
        parts={part: value / sum(parts.values()) for part, value in parts.items()},
        variance=variance,
        error=error,
        target_standard_error=target,
    )
