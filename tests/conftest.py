"""Tiny models and tokenizers, made in memory from a seed: nothing is downloaded, every test runs on a laptop."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("CI", "1")

import pytest
import torch
from accelerate.logging import MultiProcessAdapter
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trl_diffusion import LLaDAConfig, LLaDAModelLM

torch.set_num_threads(1)  # the models are tiny: a second thread only waits

WORDS = "zero one two three four five six seven eight nine plus minus is what red green blue you say hi bye"
WORDS = WORDS.split(" ")
SPECIAL = ["<|endoftext|>", "<|startoftext|>", "<|mdm_mask|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
# As published: an assistant turn is opened after every conversation, asked for or not
HUB_TEMPLATE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)


def make_tokenizer(with_mask: bool = False, **kwargs) -> PreTrainedTokenizerFast:
    """A word-level tokenizer with LLaDA's special tokens and, like LLaDA's, no `mask_token` of its own."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, "<unk>", "user", "assistant", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(SPECIAL)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        bos_token="<|startoftext|>",
        unk_token="<unk>",
        **({"mask_token": "<|mdm_mask|>"} if with_mask else {}),
        **kwargs,
    )
    fast.chat_template = HUB_TEMPLATE
    return fast


def make_model(seed: int = 0, **overrides) -> LLaDAModelLM:
    """A two-layer LLaDA with weights large enough that every token matters to every other."""
    torch.manual_seed(seed)
    config = LLaDAConfig(
        **{
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "mlp_hidden_size": 64,
            "vocab_size": 30,
            "mask_token_id": 2,
            "pad_token_id": 0,
            "eos_token_id": 0,
            "init_std": 0.2,
            **overrides,
        }
    )
    return LLaDAModelLM(config).eval()


def make_pairs(n: int = 6) -> Dataset:
    """Prompts and answers of different lengths, in TRL's standard preference format."""
    return Dataset.from_dict(
        {
            "prompt": [f"what is {WORDS[i % 10]} plus {' '.join(WORDS[: i % 3 + 1])} " for i in range(n)],
            "chosen": [" ".join(WORDS[i % 7 : i % 7 + 2 + i % 4]) for i in range(n)],
            "rejected": [" ".join(WORDS[-3 - i % 5 : -1]) for i in range(n)],
        }
    )


@pytest.fixture(autouse=True)
def warnings_are_shown_once_a_test():
    """Not once a process, or a test would see them or not by what ran before it."""
    MultiProcessAdapter.warning_once.cache_clear()


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def pairs():
    return make_pairs()


# Files whose tests compare with what one process has made for all of them: another worker would make it again. The mark
# `xdist_group` says nothing from pytest 9.2 on, which keeps the name that xdist reads elsewhere
TOGETHER = ("test_matrix.py", "test_distributed.py", "test_decoders_distributed.py")


@pytest.hookimpl(optionalhook=True)  # without xdist there is no such hook
def pytest_xdist_make_scheduler(config, log):
    """Tests are handed out one by one, and those of some files together and first."""
    from xdist.scheduler import LoadScopeScheduling

    class BySharedWork(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.split("::")[0]
            return file if file.endswith(TOGETHER) else nodeid

    return BySharedWork(config, log)


def pytest_collection_finish():
    """Every run of a trainer collects garbage, and would look through all that was imported each time: 0.4 s."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(config, items):
    """Tests that need a GPU are not there where there is none."""
    if torch.cuda.is_available():
        return
    needing = [item for item in items if item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=needing)
    items[:] = [item for item in items if item not in needing]
