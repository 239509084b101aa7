"""Small encoders of transformers, in memory and as folders, with tokenizers like those that they are published with."""

import torch
from conftest import WORDS
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedTokenizerFast

# The mask is where the tokens of tests/conftest.py have it
SPECIAL = ["[PAD]", "[CLS]", "[MASK]", "[SEP]", "[UNK]"]
VOCABULARY = [*SPECIAL, "user", "assistant", "system", ":", *WORDS]
_COMMON = {"vocab_size": len(VOCABULARY), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_OTHER_NAMES = {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64}
OWN = {
    "roberta": {"type_vocab_size": 1},  # with the padding row of its positions
    "xlm-roberta": {"type_vocab_size": 1},
    "modernbert": {
        **{"cls_token_id": 1, "sep_token_id": 3, "local_attention": 4, "global_attn_every_n_layers": 2},
        "initializer_cutoff_factor": 9.0,
    },
    "electra": {"embedding_size": 16},
    "albert": {"embedding_size": 16},
    "convbert": {"embedding_size": 32},
    "gte": {"num_key_value_heads": 4},
    "eurobert": {"num_key_value_heads": 2, "mask_token_id": 2},
}


def make_encoder(model_type, seed=0, **overrides):
    """With weights large enough that every token matters to every other, and biases that are not zero."""
    torch.manual_seed(seed)
    sizes = _OTHER_NAMES if model_type == "distilbert" else _SIZES
    fields = {**_COMMON, **sizes, "initializer_range": 0.2, **OWN.get(model_type, {}), **overrides}
    model = AutoModelForMaskedLM.from_config(AutoConfig.for_model(model_type, **fields))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def make_encoder_tokenizer(words=VOCABULARY, **special):
    """As BERT's: `[CLS]` before and `[SEP]` after every text, no end of text by name, no chat template."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{**names, "mask_token": "[MASK]", **special},
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def write_encoder(path, model_type, **overrides):
    """A folder as it is published: no mask token in its config.json."""
    make_encoder(model_type, **overrides).save_pretrained(path)
    make_encoder_tokenizer().save_pretrained(path)
    return path
