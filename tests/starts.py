"""
The starts of a run, by name: what is trained, where its reference comes from, in which precision. Each makes a trainer
whose first loss is known without a computation: ln 2 (VRPO) and 1/2 (ELBO-KTO), since its policy is its reference.
"""

import copy

import torch
from conftest import make_model, make_pairs, make_tokenizer
from peft import (
    AdaLoraConfig,
    FourierFTConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    TrainableTokensConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
)
from test_kto import make_feedback
from test_kto import make_trainer as make_kto_trainer
from test_trainers import make_trainer

LN2 = torch.tensor(2.0).log().item()  # in float32, as a loss is
METHODS = {"VRPO": (make_trainer, make_pairs, LN2), "ELBO-KTO": (make_kto_trainer, make_feedback, 0.5)}

# TRL's defaults, and what the tests use elsewhere
PRECISIONS = {
    "float32": {"bf16": False, "gradient_checkpointing": False},
    "bf16, layer checkpointing": {"bf16": True, "gradient_checkpointing": True},
}

TARGETS = ["q_proj", "v_proj"]
ADAPTERS = {
    "LoRA": lambda: LoraConfig(r=4, target_modules=TARGETS),
    "DoRA": lambda: LoraConfig(r=4, target_modules=TARGETS, use_dora=True),
    "LoRA, head saved": lambda: LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["transformer.ff_out"]),
    "LoRA on the embedding": lambda: LoraConfig(r=4, target_modules=[*TARGETS, "wte"]),
    "LoRA, tokens": lambda: LoraConfig(r=4, target_modules=TARGETS, trainable_token_indices={"wte": [9, 10, 11]}),
    "LoRA on a parameter": lambda: LoraConfig(r=4, target_modules=[], target_parameters=["wte.weight"]),
    "PiSSA": lambda: LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="pissa"),
    "tokens": lambda: TrainableTokensConfig(target_modules=["wte"], token_indices=[9, 10, 11]),
    "IA3": lambda: IA3Config(target_modules=[*TARGETS, "ff_proj"], feedforward_modules=["ff_proj"]),
    "layer norms": lambda: LNTuningConfig(target_modules=["attn_norm", "ff_norm"]),
    "AdaLoRA": lambda: AdaLoraConfig(init_r=4, total_step=10, target_modules=TARGETS),
    "LoHa": lambda: LoHaConfig(r=4, target_modules=TARGETS),
    "VeRA": lambda: VeraConfig(r=4, target_modules=["q_proj"]),
    "VB-LoRA": lambda: VBLoRAConfig(r=4, target_modules=TARGETS, vector_length=8, num_vectors=16),
    "HRA": lambda: HRAConfig(r=4, target_modules=TARGETS),
    "FourierFT": lambda: FourierFTConfig(n_frequency=20, target_modules=TARGETS),
}
# Those that change the model as soon as they are made
CHANGING_AT_ONCE = ("PiSSA", "FourierFT", "VB-LoRA")


def ready_made(adapter: str, trained: bool = True, **model) -> PeftModel:
    """A model that comes with an adapter; the trained ones are far from the base model."""
    torch.manual_seed(0)
    wrapped = get_peft_model(make_model(**model), ADAPTERS[adapter]())
    torch.manual_seed(1)
    for parameter in (p for p in wrapped.parameters() if p.requires_grad and trained):
        parameter.data += 0.3 * torch.randn_like(parameter)
    return wrapped


def on_disk(model, folder) -> str:
    """The folder, as a trainer would have left it."""
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def adapter_on_disk(folder) -> str:
    """A trained adapter in a folder of its own, which says where its base model is."""
    base = on_disk(make_model(), folder / "base")
    wrapped = ready_made("LoRA on the embedding")
    wrapped.peft_config["default"].base_model_name_or_path = base
    return on_disk(wrapped, folder / "adapter")


# What is trained: a folder to what a trainer is given
POLICIES = {
    "all weights": lambda folder: {"model": make_model()},
    "all weights, by path": lambda folder: {"model": on_disk(make_model(), folder / "model")},
    "LoRA": lambda folder: {"model": make_model(), "peft_config": LoraConfig(r=4)},
    "LoRA, by path": lambda folder: {
        "model": on_disk(make_model(), folder / "model"),
        "peft_config": LoraConfig(r=4),
    },
    "ready-made adapter": lambda folder: {"model": ready_made("LoRA", trained=False)},
    "trained adapter": lambda folder: {"model": ready_made("LoRA on the embedding")},
    "trained adapter, by path": lambda folder: {"model": adapter_on_disk(folder)},
}
# Where the reference comes from
REFERENCES = {
    "the policy's own": {},
    "precomputed": {"precompute_ref_log_probs": True},
    "given": {},
    "synced": {"sync_ref_model": True},
}


def refusal(policy: str, reference: str) -> str:
    """What is said of a start that cannot be; empty for one that can."""
    return "`sync_ref_model=True` while using a PEFT model" if reference == "synced" and "all" not in policy else ""


def start(folder, method: str, policy: str, reference: str, precision: str, **options):
    """A trainer at its start."""
    make, rows, _ = METHODS[method]
    given = POLICIES[policy](folder)
    if reference == "given":
        given["ref_model"] = _again(given["model"])
    settings = {**PRECISIONS[precision], **REFERENCES[reference], "max_steps": 1, **options}
    return make(folder / "out", dataset=rows(4), **given, **settings)


def _again(model):
    """The same model once more."""
    if not isinstance(model, str):
        return copy.deepcopy(model)
    if model.endswith("adapter"):
        return ready_made("LoRA on the embedding")
    return make_model()


def first_loss(trainer) -> float:
    trainer.train()
    return trainer.state.log_history[0]["loss"]
