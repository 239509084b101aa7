"""
Policy and reference, scored as they are: no trainer is made, nothing is wrapped, and the models are left as they came.

The trainer's way from a path to a model and from rows to tokens is used, and its ELBO head, called directly.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from ..checks.datasets import check_datasets
from ..checks.inputs import check_arguments, check_models, check_same_vocabulary
from ..checks.numbers import naming_the_example
from ..estimators.draws import MaskDraws, MaskSampler
from ..models.denoiser import check_denoiser, resolve_mask_token_id
from ..models.families import blocks_of
from ..scoring.adapters import base_of, refuse_changed_base
from ..scoring.door import hash_module
from ..scoring.head import ELBOHead
from ..scoring.key import scoring_key
from ..trainers.loading import find_model, load_model, load_tokenizer, loading_options, tokenizer_of
from ..trainers.vrpo.config import DiffusionVRPOConfig
from ..trainers.vrpo.trainer import DiffusionVRPOTrainer


class _Desk(DiffusionVRPOTrainer):
    """What the trainer does with a path and with rows before there is a trainer: its constructor is not called."""

    def __init__(self, args: DiffusionVRPOConfig):
        self.args = args

    def tokens(self, dataset: Any, model: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
        """Rows with `prompt_ids`, `chosen_ids` and `rejected_ids`."""
        self._tokenizer = tokenizer
        check_denoiser(self._go_by(model), resolve_mask_token_id(self._model_config, tokenizer))
        return self._prepare_dataset(dataset, tokenizer, self.args, "train")


@dataclass(frozen=True)
class Scorer:
    """
    A policy and its reference.

    Args:
        policy: a denoiser, with an adapter or without.
        reference: another one; without it the policy without its adapter, if it has one, or else the policy itself.
        tokenizer: of both.
        args: precision and memory of a forward.
    """

    policy: Any
    reference: Any
    tokenizer: PreTrainedTokenizerBase
    args: DiffusionVRPOConfig

    @property
    def mask_token_id(self) -> int:
        return resolve_mask_token_id(base_of(self.policy).config, self.tokenizer)

    def key(self) -> str:
        """Names the two functions: equal keys give equal log-probabilities of equal rows and draws."""
        models = [model for model in (self.policy, self.reference) if model is not None]
        return repr([(hash_module(m), scoring_key(m, self.mask_token_id, self.args.mixed_precision)) for m in models])

    def blocks(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """Of a block diffusion model, the number of each token's block."""
        return blocks_of(base_of(self.policy).config, inputs["maskable"], inputs["attention_mask"].bool())

    def score(
        self, sampler: MaskSampler, inputs: dict[str, torch.Tensor], nonce: int
    ) -> tuple[MaskDraws, torch.Tensor, torch.Tensor]:
        """The draws of a nonce, and `(K, B, L)` log-probabilities on them, of the policy and of the reference."""
        rows = (inputs["maskable"], inputs["input_ids"], inputs["attention_mask"])
        draws = sampler(*rows, nonce, blocks=self.blocks(inputs))
        head = ELBOHead(sampler, self.mask_token_id, self.args.draws_per_forward)
        labels = inputs["input_ids"].masked_fill(~inputs["maskable"], -100)

        def log_probs(model: Any) -> torch.Tensor:
            ids, targets, real = (x.to(model.device) for x in (inputs["input_ids"], labels, inputs["attention_mask"]))
            output = head(base_of(model), ids, targets, real, nonce)
            assert output.elbo is not None
            return output.elbo.log_probs.cpu()

        with torch.no_grad(), self._autocast(), naming_the_example(inputs, self.tokenizer):
            policy = log_probs(self.policy)
            if self.reference is not None:
                return draws, policy, log_probs(self.reference)
            if isinstance(self.policy, PeftModel):
                with self.policy.disable_adapter():
                    return draws, policy, log_probs(self.policy)
        return draws, policy, policy

    def _autocast(self) -> Any:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.args.mixed_precision)
        return torch.autocast(self.policy.device.type, dtype) if dtype else nullcontext()

    @contextmanager
    def left_as_it_came(self) -> Iterator[None]:
        """Evaluation mode inside the block; after it the mode of each module and `requires_grad` are what they were."""
        modules = [module for model in (self.policy, self.reference) if model is not None for module in model.modules()]
        training = [module.training for module in modules]
        trained = [(p, p.requires_grad) for module in modules for p in module.parameters(recurse=False)]
        for module in modules:
            module.training = False
        try:
            yield
        finally:
            for module, mode in zip(modules, training, strict=True):
                module.training = mode
            for parameter, requires_grad in trained:
                parameter.requires_grad_(requires_grad)


def prepare(
    model: Any,
    ref_model: Any,
    dataset: Any,
    args: DiffusionVRPOConfig,
    tokenizer: Any,
    peft_config: Any,
    quantization_config: Any,
) -> tuple[Scorer, list[dict[str, torch.Tensor]]]:
    """
    What is scored, checked: policy and reference, and each pair as a batch of two rows.

    Raises:
        ValueError: the models cannot be compared, or a pair cannot be scored.
    """
    desk = _Desk(args)
    check_arguments(args, DiffusionVRPOConfig, None)
    check_models(model, ref_model, tokenizer)
    check_datasets(args, dataset, None, desk._row_forms, desk._reference_columns)
    _check_adapters(model, ref_model, peft_config)
    if isinstance(model, str):
        options = loading_options(args)
        if quantization_config is not None:
            options["quantization_config"] = quantization_config
        source = find_model(model, options)
        tokenizer = tokenizer or load_tokenizer(source, options)
        model = load_model(source, options)
        _check_adapters(model, ref_model, peft_config)  # the path may be that of an adapter
    elif quantization_config is not None:
        raise ValueError("`quantization_config` is for a model that is given by its path: this one is loaded already.")
    tokenizer = tokenizer or tokenizer_of(base_of(model).config, loading_options(args))
    rows = desk.tokens(dataset, model, tokenizer)
    scorer = Scorer(_placed(model, args), _placed(ref_model, args), tokenizer, args)
    if ref_model is not None:
        check_same_vocabulary(base_of(model).config, base_of(ref_model).config, tokenizer)
        check_denoiser(base_of(ref_model), scorer.mask_token_id)
    return scorer, [_pair(row) for row in rows]


def _check_adapters(model: Any, ref_model: Any, peft_config: Any) -> None:
    """Refuse adapters that are not a policy beside its base model, the reference."""
    if isinstance(model, PeftModel) and peft_config is not None:
        raise ValueError("The model has an adapter, and `peft_config` would make another: leave `peft_config` out.")
    if getattr(peft_config, "init_lora_weights", True) is False:
        raise ValueError(
            "`peft_config` with `init_lora_weights=False` makes an adapter of random weights, and what is scored is "
            "the model from which training starts. Make it with `peft.get_peft_model`, and pass that as `model`."
        )
    configs = list(getattr(model, "peft_config", {}).values()) + [peft_config] * (peft_config is not None)
    if any(config.is_prompt_learning for config in configs):
        raise ValueError(
            "Virtual tokens before the prompt cannot be scored: use an adapter on the layers, such as LoRA."
        )
    for config in configs if ref_model is None else ():
        refuse_changed_base(config, "Pass that one as `ref_model`.")


def _placed(model: Any, args: DiffusionVRPOConfig) -> Any:
    """On the device of the arguments, unless it was loaded onto some."""
    fixed = model is None or hasattr(model, "hf_device_map") or getattr(model, "quantization_method", None)
    return model if fixed else model.to(args.device)


def _pair(row: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Chosen and rejected as two rows, padded on the right with zeros that nothing reads."""
    prompt = len(row["prompt_ids"])
    ids = [torch.tensor([*row["prompt_ids"], *row[name]]) for name in ("chosen_ids", "rejected_ids")]
    input_ids = pad_sequence(ids, batch_first=True)
    real = torch.arange(input_ids.shape[1]) < torch.tensor([[len(each)] for each in ids])
    return {"input_ids": input_ids, "attention_mask": real, "maskable": real & (torch.arange(real.shape[1]) >= prompt)}
