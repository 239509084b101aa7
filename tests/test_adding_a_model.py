"""The law: a page that is followed word by word leads where it says. Its blocks are run one after the other."""

import re
from pathlib import Path

import pytest
import torch
from encoders import make_encoder, make_encoder_tokenizer
from transformers import AutoConfig, AutoModelForMaskedLM

from trl_diffusion.models import families
from trl_diffusion.models.families import class_to_load, family_of

DOCS = Path(__file__).parent.parent / "docs"


def follow(page, **replaced):
    """The names that the blocks of a page leave behind, which is followed with other texts in place of some of it."""
    code = "\n".join(re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL))
    for old, new in replaced.values():
        assert old in code, f"{page} has no {old} any more"
        code = code.replace(old, new)
    names = {"__name__": "__main__"}
    exec(compile(code, page, "exec"), names)
    return names


@pytest.fixture
def known(monkeypatch, tmp_path):
    """What a page tells the package is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(families, "FAMILIES", list(families.FAMILIES))
    torch.manual_seed(0)


def test_a_model_is_added(known, capsys, tmp_path):
    names = follow("adding-a-model.md")
    printed = capsys.readouterr().out
    assert [" ".join(line.split()[:2]) for line in printed.splitlines() if line.startswith("head ")] == [
        "head wrong",
        "head right",
    ]
    assert family_of(names["config"]).logit_shift == 1
    assert names["trainer"].state.log_history[-1]["train_loss"] == pytest.approx(0.6931, abs=1e-4)  # ln 2
    config = names["MineConfig"](hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    config.vocab_size = 9
    names["MineForMaskedDiffusion"](config).save_pretrained(tmp_path / "mine")
    found = AutoConfig.from_pretrained(tmp_path / "mine")
    assert class_to_load(found) is AutoModelForMaskedLM
    assert type(class_to_load(found).from_pretrained(tmp_path / "mine")) is names["MineForMaskedDiffusion"]


def test_a_small_encoder_becomes_polite(known, capsys, tmp_path):
    """On one that has learnt nothing: its held-out margin rises all the same."""
    names = "anna ben clara david emma frank grace henry iris jack kate liam mary noah olga paul rose sam tina viktor"
    rest = "asked for help came late lost the key called at night wanted to leave answer was of course with pleasure no"
    text = f"{names} {rest} go away in a hurry . , :"
    words = ["[PAD]", "[CLS]", "[MASK]", "[SEP]", "[UNK]", *dict.fromkeys(text.split())]
    make_encoder("distilbert", vocab_size=len(words), eos_token_id=None).save_pretrained(tmp_path / "encoder")
    make_encoder_tokenizer(words).save_pretrained(tmp_path / "encoder")
    found = follow(
        "a-small-encoder.md",
        model=('"distilbert/distilbert-base-uncased"', '"encoder"'),
        epochs=("num_train_epochs=3", "num_train_epochs=2"),  # enough for one as small
    )
    assert found["before"]["eval_loss"] == pytest.approx(0.6931, abs=1e-4)  # ln 2
    assert found["before"]["eval_rewards/margins"] == 0 < found["after"]["eval_rewards/margins"]
    assert found["after"]["eval_rewards/accuracies"] > 0.9
    assert found["base"].shape == found["aligned"].shape == (1, found["prompt"]["input_ids"].shape[1] + 8)
    assert (tmp_path / "polite-encoder" / "adapter_model.safetensors").exists()
