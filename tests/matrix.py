"""
The cells of test_matrix.py: what a user may combine, how each combination is built and run, and what must come out.

A cell is two steps of plain SGD with a large learning rate, so that weights move by their gradients. Its oracle is the
same start trained on one process in float32 by plain autograd, from a model in memory: two other routes, unless the
cell is that very one.
"""

import contextlib
import itertools
import os
import traceback
from dataclasses import dataclass, fields, replace

import torch
import transformers.training_args
from conftest import make_model, make_pairs, make_tokenizer
from datasets import load_from_disk
from peft import LoraConfig, PeftModel, get_peft_model
from processes import FSDP, fsdp_on_the_cpu, run_forked
from test_kto import make_feedback
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from trl_diffusion import DiffusionVRPOConfig, DiffusionVRPOTrainer, ELBOKTOConfig, ELBOKTOTrainer
from trl_diffusion.models import SDARConfig

VALUES = {
    "launch": ("one", "ddp", "fsdp2", "zero2", "zero3"),
    "trainer": ("vrpo", "kto"),
    "weights": ("all", "lora", "qlora", "peft"),
    "reference": ("off", "ref", "ref_model", "copy", "precomputed", "synced"),
    "precision": ("bf16", "fp32"),
    "source": ("path", "memory"),
    "checkpointing": ("on", "off"),
    "family": ("llada", "sdar"),  # sees all, and block by block
}
# What there is to be a reference, by what is trained: "off" is the model without its adapter, "ref" a copy of it
REFERENCES = {
    "all": ("ref_model", "copy", "precomputed", "synced"),
    "lora": ("off", "ref_model", "precomputed"),
    "qlora": ("off", "ref_model", "precomputed"),
    "peft": ("ref", "ref_model", "precomputed"),
}
LAYERS = {"llada": "LLaDALlamaBlock", "sdar": "Qwen3DecoderLayer"}
STEPS = 2
LEARNING_RATE = 0.25
BETA = 0.2
# accelerate takes DeepSpeed for a thing of accelerators: told that this is a CPU, it goes on without
NO_CPU = {"use_cpu": False, "ddp_backend": "gloo", "dataloader_pin_memory": False}


@dataclass(frozen=True)
class Cell:
    """One combination, a value of each of VALUES."""

    launch: str
    trainer: str
    weights: str
    reference: str
    precision: str
    source: str
    checkpointing: str
    family: str

    @property
    def processes(self):
        return 1 if self.launch == "one" else 2

    @property
    def oracle(self):
        # A reference that moves, or that is scored on the same draws in each step, has an oracle of its own kind
        alone = self.reference in ("synced", "precomputed")
        reference = self.reference if alone else REFERENCES[self.weights][0]
        return Cell("one", self.trainer, self.weights, reference, "fp32", "memory", "off", self.family)

    def __str__(self):
        return " ".join(getattr(self, field.name) for field in fields(self))


def read(table):
    return [Cell(*line.split()) for line in table.strip().splitlines()]


def every_cell():
    return [Cell(*values) for values in itertools.product(*VALUES.values())]


def pairs(cell):
    """Every two values that the cell brings together."""
    return set(itertools.combinations(((field.name, getattr(cell, field.name)) for field in fields(cell)), 2))


def save_inputs(folder):
    """What cells load, by family: a model, an adapter that was trained before, and rows."""
    for family, make in {"llada": make_llada, "sdar": make_sdar}.items():
        model = make()
        model.save_pretrained(folder / family / "model")
        make_tokenizer().save_pretrained(folder / family / "model")
        adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        adapted.save_pretrained(folder / family / "adapter")


def make_llada():
    return make_model(d_model=64, mlp_hidden_size=128)  # 4-bit blocks have 64 weights


def make_sdar():
    """Of the same sizes, and with the same special tokens."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 30, "initializer_range": 0.2}
    tokens = {"mask_token_id": 2, "bos_token_id": 1, "pad_token_id": 0, "eos_token_id": 0}
    return AutoModelForCausalLM.from_config(SDARConfig(**sizes, **tokens, block_size=4)).eval()


def nf4(cell):
    # As examples/accelerate_configs/fsdp2_qlora.yaml says: weights that are no floats would not be sharded
    storage = {"bnb_4bit_quant_storage": torch.bfloat16} if cell.launch == "fsdp2" else {}
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16, **storage
    )


def load(folder, **how):
    return AutoModelForCausalLM.from_pretrained(str(folder / "model"), **how)


def model_of(cell, folder):
    folder = folder / cell.family
    if cell.weights == "peft":
        return PeftModel.from_pretrained(load(folder), str(folder / "adapter"), is_trainable=True)
    if cell.source == "path":
        return str(folder / "model")
    if cell.weights == "qlora":
        return load(folder, quantization_config=nf4(cell), dtype=torch.bfloat16)
    return load(folder)


def reference_of(cell, folder):
    """A model of its own, where the cell has one: equal to the policy, so that the loss at the start is known."""
    if cell.reference != "ref_model":
        return None
    model = model_of(replace(cell, source="memory"), folder)
    # With the adapter in its layers, but not merged into them, which would round
    return model.get_base_model() if cell.weights == "peft" else model


def make_trainer(cell, folder, rows, **options):
    trainer, config = {
        "vrpo": (DiffusionVRPOTrainer, DiffusionVRPOConfig),
        "kto": (ELBOKTOTrainer, ELBOKTOConfig),
    }[cell.trainer]
    synced = {"sync_ref_model": True, "ref_model_sync_steps": 1} if cell.reference == "synced" else {}
    on_the_cpu = NO_CPU if cell.launch.startswith("zero") else {"use_cpu": True}
    defaults = {
        "bf16": cell.precision == "bf16",
        "gradient_checkpointing": cell.checkpointing == "on",
        "precompute_ref_log_probs": cell.reference == "precomputed",
        "per_device_train_batch_size": 4 // cell.processes,
        "max_steps": STEPS,
        "num_mc_samples": 2,
        "beta": BETA,
        "optim": "sgd",
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    args = config(str(folder / "out"), **{**defaults, **synced, **on_the_cpu, **options})
    return trainer(
        model_of(cell, folder),
        reference_of(cell, folder),
        args,
        train_dataset=load_from_disk(str(rows)),
        processing_class=make_tokenizer(),
        peft_config=LoraConfig(r=4) if cell.weights in ("lora", "qlora") else None,
        quantization_config=nf4(cell) if cell.weights == "qlora" and cell.source == "path" else None,
    )


def weights_of(trainer):
    """What is trained, whole, under the names of the model itself."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    cut_up = [p for p in weights.values() if hasattr(p, "ds_id")]
    with gathered(cut_up):
        whole = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in weights.items()}
        return {name: weight.detach().float().clone() for name, weight in whole.items()}


def gathered(parameters):
    if not parameters:
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)


def train(cell, folder, **options):
    """What was logged in each step; what was trained, before and after."""
    rows = folder / "rows" / str(cell).replace(" ", "-")  # of its own: reference values are stored beside them
    trainer = make_trainer(cell, folder, rows, **options)
    before = weights_of(trainer)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry], before, weights_of(trainer)


def train_all(cells, folder, **options):
    """In forked processes: the outcome of each cell, or what it raised, into a file of its own."""
    for cell in cells:
        os.environ.update({name: str(value) for name, value in environment_of(cell).items()})
        try:
            outcome = train(cell, folder, **options)
        except Exception:
            outcome = "\n".join(traceback.format_exc().splitlines()[-12:])
        if int(os.environ.get("RANK", 0)) == 0:
            torch.save(outcome, folder / f"{cell}.pt")


def compile_nothing():
    """DeepSpeed builds a collective of its own at its first start: it takes a compiler, and a lock may outlive it."""
    import deepspeed

    deepspeed.ops.__compatible_ops__.clear()  # gloo has all that is needed


def environment_of(cell):
    """What `accelerate launch` sets for the configurations in examples/accelerate_configs."""
    precision = {"ACCELERATE_MIXED_PRECISION": "bf16" if cell.precision == "bf16" else "no"}
    if cell.launch == "fsdp2":
        layers = {"FSDP_TRANSFORMER_CLS_TO_WRAP": LAYERS[cell.family]}
        return {**FSDP, **layers, **precision, "FSDP_CPU_RAM_EFFICIENT_LOADING": str(cell.source == "path").lower()}
    if cell.launch.startswith("zero"):
        whole = {"ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true"} if cell.launch == "zero3" else {}
        init = cell.launch == "zero3" and cell.source == "path"
        return {
            **precision,
            "DS_ACCELERATOR": "cpu",
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_ZERO_STAGE": cell.launch[-1],
            "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
            "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
            "ACCELERATE_DEEPSPEED_ZERO3_INIT": str(init).lower(),
            **whole,
        }
    return precision


def run(cells, folder, words=None, **options):
    """Cells of one launch, in processes that are forked once; the outcomes by cell. `words` makes responses as long."""
    for cell in cells:
        rows = make_pairs(8) if cell.trainer == "vrpo" else make_feedback(8)
        rows = rows.map(repeated, fn_kwargs={"words": words}) if words else rows
        rows.save_to_disk(str(folder / "rows" / str(cell).replace(" ", "-")))
    codes = run_forked(train_all_pretending, cells, folder, options, processes=cells[0].processes, folder=folder)
    assert set(codes) == {0}, "".join(log.read_text()[-3000:] for log in folder.glob("rank*.log"))
    return {cell: torch.load(folder / f"{cell}.pt") for cell in cells}


def repeated(row, words):
    """A row whose responses are said again and again, until they have so many words."""
    responses = {"chosen", "rejected", "completion"} & set(row)
    return {name: " ".join((row[name].split() * words)[:words]) for name in responses}


def train_all_pretending(cells, folder, options):
    with as_on_accelerators(cells[0].launch):
        train_all(cells, folder, **options)


def as_on_accelerators(launch):
    """accelerate and transformers offer FSDP, and DeepSpeed in bfloat16, to machines with accelerators only."""
    if launch.startswith("zero"):
        compile_nothing()
        transformers.training_args.is_torch_bf16_gpu_available = lambda: True
    return fsdp_on_the_cpu() if launch.startswith("fsdp2") else contextlib.nullcontext()
