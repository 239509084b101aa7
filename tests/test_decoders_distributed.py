"""
The law: a bidirectional decoder on two processes is the one on one, also where its layers are sharded by their own
names, and where its head is its embedding.
"""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from conftest import make_pairs
from datasets import load_from_disk
from encoders import make_encoder
from peft import LoraConfig
from processes import run_forked
from test_decoders import FOLDERS
from test_distributed import COMMON, FSDP, assert_the_same, fsdp_on_the_cpu, logs, outcome
from test_experts import EVERYWHERE
from test_lfm2 import make_lfm2
from test_llada2 import EVERYWHERE as LLADA2_EVERYWHERE
from test_trainers import make_trainer

pytestmark = pytest.mark.slow

# All weights, with tied heads, block by block; adapters, with shifted logits and a tied head block by block, on experts
# that not every token meets, on encoders
CELLS = {
    "iLLaDA": (FOLDERS["iLLaDA"].model, None),
    "SDAR": (FOLDERS["SDAR"].model, None),
    "Fast-dLLM v2": (FOLDERS["Fast-dLLM v2"].model, LoraConfig(r=4)),
    "Nemotron": (FOLDERS["Nemotron"].model, LoraConfig(r=4)),
    "LLaDA-MoE": (FOLDERS["LLaDA-MoE"].model, LoraConfig(r=4, target_modules=EVERYWHERE)),
    "LLaDA2": (FOLDERS["LLaDA2"].model, LoraConfig(r=4, target_modules=LLADA2_EVERYWHERE)),
    "LFM2.5": (make_lfm2, LoraConfig(r=4)),
    "bert": (partial(make_encoder, "bert", mask_token_id=2), None),
    "roberta": (partial(make_encoder, "roberta", mask_token_id=2), None),
    "distilbert": (partial(make_encoder, "distilbert", mask_token_id=2), None),
    "electra": (partial(make_encoder, "electra", mask_token_id=2), LoraConfig(r=4)),
    "modernbert": (partial(make_encoder, "modernbert", mask_token_id=2), LoraConfig(r=4)),
}
LN2 = torch.tensor(2.0).log().item()
REFUSED_BY_FSDP = {
    "bert": "`cls.predictions.decoder.bias` and `cls.predictions.bias`",
    "roberta": "`lm_head.decoder.bias` and `lm_head.bias`",
}
# Which layers are wrapped is then what the model says
BY_THE_MODEL = {name: value for name, value in FSDP.items() if name != "FSDP_TRANSFORMER_CLS_TO_WRAP"}


def train_cells(folder, processes, sharded):
    with fsdp_on_the_cpu() if sharded else nullcontext():
        for name, (make, adapter) in CELLS.items():
            if sharded and name in REFUSED_BY_FSDP:
                continue
            options = {**COMMON, "per_device_train_batch_size": 4 // processes}
            rows = load_from_disk(str(folder / "rows"))
            trainer = make_trainer(folder / "out", make(), dataset=rows, peft_config=adapter, **options)
            trainer.train()
            result = outcome(trainer)
            if trainer.is_world_process_zero():
                torch.save(result, folder / f"{name} {processes}.pt")
        trainer.accelerator.wait_for_everyone()
        trainer.accelerator.end_training()


@pytest.fixture(scope="module")
def on_one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoders")
    make_pairs(16).save_to_disk(str(folder / "rows"))
    assert run_forked(train_cells, folder, 1, False, folder=folder) == [0], logs(folder)
    return folder


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
def test_two_processes_equal_one(on_one, sharded):
    environment = BY_THE_MODEL if sharded else {}
    codes = run_forked(train_cells, on_one, 2, sharded, processes=2, folder=on_one, environment=environment)
    assert codes == [0, 0], logs(on_one)
    for name in CELLS if not sharded else CELLS.keys() - REFUSED_BY_FSDP.keys():
        assert_the_same(on_one, name, 2)
    assert torch.load(on_one / "SDAR 2.pt")[0][0] == LN2  # its reference is whole, and scored as shards are


def refused_by_fsdp(folder):
    with fsdp_on_the_cpu():
        for name, message in REFUSED_BY_FSDP.items():
            with pytest.raises(ValueError, match=message):
                make_trainer(folder / "out", CELLS[name][0]())


def test_a_bias_that_is_there_twice_is_no_weight_for_fsdp(tmp_path):
    """torch would find it when training begins."""
    codes = run_forked(refused_by_fsdp, tmp_path, processes=2, folder=tmp_path, environment=BY_THE_MODEL)
    assert codes == [0, 0], logs(tmp_path)
