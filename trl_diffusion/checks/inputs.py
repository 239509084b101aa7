"""
What a trainer is given, checked before TRL sees it: models, tokenizers and folders.

TRL finds the same faults later, as an index error inside torch, or trains on.
"""

from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..models.denoiser import is_word, resolve_mask_token_id
from ..models.families import family_of


def check_arguments(args: Any, config_class: Any, compute_metrics: Any) -> None:
    """Refuse the configuration of another trainer, metrics of logits, and a folder that cannot be written to."""
    if not isinstance(args, config_class):
        raise TypeError(f"`args` must be a `{config_class.__name__}`, got `{type(args).__name__}`.")
    if compute_metrics is not None:
        raise ValueError(
            "`compute_metrics` would be given the logits of the text without masks, which mean nothing for a masked "
            "diffusion model. Leave it out; rewards and ELBOs are logged."
        )
    if args.should_save:
        check_writable(args.output_dir)


def check_writable(output_dir: str) -> None:
    """
    Refuse a folder in which nothing can be saved, before there is anything to save.

    Raises:
        OSError: the folder cannot be made, or no file in it.
    """
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=output_dir) as file:
            file.write(b"x" * 4096)
            file.flush()
    except OSError as error:
        raise OSError(
            f"`output_dir={output_dir!r}` cannot be written to: {error}. Give a folder that can, with room for the "
            "checkpoints."
        ) from error


def check_models(model: Any, ref_model: Any, tokenizer: Any) -> None:
    """Refuse what cannot be trained as a model, and a model in memory whose tokenizer cannot be found."""
    for name, value, other, ways in (
        ("model", model, isinstance(model, str), "a path or a model"),
        ("ref_model", ref_model, ref_model is None, "None or a model"),
    ):
        if not (other or isinstance(value, PreTrainedModel | PeftModel)):
            raise TypeError(f"`{name}` must be {ways} of transformers or PEFT, got `{type(value).__name__}`.")
        if getattr(value, "_compiled_call_impl", None) is not None:
            raise ValueError(
                f"`{name}` was compiled (`compile()`): every response runs at its own length, so that nearly every "
                "forward would be compiled anew. Give a model that is not."
            )
    _check_adapted(model)
    if ref_model is not None and not isinstance(model, str):
        _refuse_shared_reference(model, ref_model)
    if not isinstance(tokenizer, PreTrainedTokenizerBase | None):
        raise TypeError(
            f"`processing_class` must be a tokenizer of transformers or None, got `{type(tokenizer).__name__}`. Load "
            "it with `AutoTokenizer.from_pretrained`; a processor has it as `processor.tokenizer`."
        )
    if tokenizer is None and not isinstance(model, str) and not getattr(model.config, "_name_or_path", ""):
        raise ValueError(
            "`processing_class` is required with a model that was made in memory, whose tokenizer cannot be found: "
            "pass the tokenizer that its token ids come from."
        )


def _check_adapted(model: Any) -> None:
    """Refuse an adapter that is where it cannot be trained."""
    if not isinstance(model, PeftModel) and getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            "`model` has an adapter that transformers put into its layers (`load_adapter`, `add_adapter`, or "
            "`from_pretrained` of an adapter's folder): a run could not be told from one of all weights, nor resumed. "
            "Give the path of the adapter as `model`, or `PeftModel.from_pretrained(base_model, path, "
            "is_trainable=True)`; for a new one, the model alone and `peft_config`."
        )
    if isinstance(model, PeftModel) and any(isinstance(m, BaseTunerLayer) and m.merged for m in model.modules()):
        raise ValueError(
            "The adapter of `model` is merged into the base model: it would get no gradient, and the base model is not "
            "what the adapter was added to. Call `model.unmerge_adapter()`."
        )


def _refuse_shared_reference(model: Any, ref_model: Any) -> None:
    """Refuse a reference of which some weights are those that are trained."""
    held = {id(parameter) for parameter in ref_model.parameters()}
    name = next((name for name, p in model.named_parameters() if p.requires_grad and id(p) in held), "")
    if name and ref_model is not model:  # which TRL refuses
        raise ValueError(
            f"`ref_model` holds the weight `{name}`, which is trained: it would move with the policy, and every reward "
            "be zero. `peft.get_peft_model` puts its adapter into the model that it is given, so that this is no "
            "reference. Leave `ref_model` out, or load the model once more."
        )


def check_placed(model: Any, name: str) -> None:
    """
    Refuse a model whose weights are elsewhere than where they are computed with: they come for a forward only.

    Raises:
        ValueError: names one.
    """
    elsewhere = [key for key, parameter in model.named_parameters() if parameter.is_meta]
    if elsewhere:
        raise ValueError(
            f"`{name}` has {len(elsewhere)} weights on the meta device, `{elsewhere[0]}` first: a `device_map` left "
            "them to the CPU or a disk, or they were never loaded. Training needs all of them on its devices: load "
            "without `device_map`, in 4 bits if that is too large, or spread over processes by FSDP2 or ZeRO-3."
        )


def check_same_vocabulary(config: Any, other: Any, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Refuse a reference, of the configuration `other`, that cannot be scored on the policy's input."""
    cure = "The two have to be scored on the same input: use a reference of the same family and vocabulary."
    masks = [resolve_mask_token_id(each, tokenizer) for each in (config, other)]
    if masks[0] != masks[1]:
        raise ValueError(f"The mask token of the model is {masks[0]}, and its reference has {masks[1]}. {cure}")
    if other.vocab_size != config.vocab_size:
        raise ValueError(
            f"The model's vocabulary has {config.vocab_size} tokens and its reference's has {other.vocab_size}. {cure}"
        )


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: Any) -> None:
    """Refuse a tokenizer without an end of text, whose special tokens are the mask, or that is another model's."""
    if tokenizer.eos_token_id is None:
        raise ValueError("The tokenizer has no end of text, which every completion ends in: set `tokenizer.eos_token`.")
    mask = resolve_mask_token_id(config, tokenizer)
    for name in ("eos_token", "bos_token", "unk_token"):
        if getattr(tokenizer, f"{name}_id") == mask:
            raise ValueError(
                f"`tokenizer.{name}` is the mask token ({mask}), so it would be taken for noise wherever it stands. "
                f"Set `tokenizer.{name}` to the token that the model was trained with."
            )
    _refuse_words_as_ends(tokenizer, config)


def _refuse_words_as_ends(tokenizer: PreTrainedTokenizerBase, config: Any) -> None:
    """
    Refuse a tokenizer for which the end of text of a known family is a word: it is another model's.

    Of a model that is of no family the configuration may have been left at its defaults. A tokenizer that has the
    same special tokens at the same places, and other words between them, is not found here but by what the data cost.
    """
    ends = getattr(config, "eos_token_id", None)
    ends = ends if isinstance(ends, list | tuple) else [end for end in (ends,) if end is not None]
    if not family_of(config).model_types or not ends or not all(is_word(end, tokenizer) for end in ends):
        return
    names = [tokenizer.convert_ids_to_tokens(end) if end < len(tokenizer) else None for end in ends]
    raise ValueError(
        f"The end of text of the model (model_type={config.model_type!r}) is {ends[0]}, which is no special token of "
        f"the tokenizer: {names[0]!r}. Use the tokenizer that belongs to the model, or correct "
        "`model.config.eos_token_id`."
    )


def refuse_unknown_token(token: int, vocab_size: int) -> None:
    """Refuse a token that the model has no row for."""
    if token >= vocab_size:
        raise ValueError(
            f"The tokenizer makes the token {token}, and the model's vocabulary has {vocab_size} tokens. Use the "
            "tokenizer that belongs to the model, or call `model.resize_token_embeddings(len(tokenizer))`."
        )


def require_trainable(model: Any) -> None:
    """Refuse to train a model of which no weight would change."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        adapter = isinstance(model, PeftModel)
        cure = "Load its adapter with `is_trainable=True`" if adapter else "Call `model.requires_grad_(True)`"
        raise ValueError(
            f"No weight of the `{type(model).__name__}` requires a gradient, so nothing would be trained. {cure} "
            "before it is given to the trainer."
        )
