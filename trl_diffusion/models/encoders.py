"""
Encoders with a masked-language head: the classes of transformers as they are.

They predict a token at its own position, from all others, as a masked diffusion model does, but their head is more than
a matrix: it is said in their records. They were not made for conversations, and get a chat template.
"""

from .family import Family, Head

# [CLS] user: a question [SEP] assistant: an answer [SEP]. A separator ends a turn, as in their pre-training. The space
# after a role belongs to what follows it, since some tokenizers make one token of a space and a word.
_CHAT_TEMPLATE = (
    "{{- cls_token -}}"
    "{%- for message in messages -%}"
    "{{- message['role'] + ': ' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] | trim + sep_token -}}{%- endgeneration -%}"
    "{%- else -%}{{- message['content'] | trim + sep_token -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'assistant:' -}}{%- endif -%}"
)


def _encoder(name: str, *model_types: str, transform: tuple[str, ...], head: tuple[str, ...]) -> Family:
    """
    Args:
        name: for messages.
        *model_types: that have this head.
        transform: what hidden states pass before the output embedding.
        head: modules that make it up.
    """
    return Family(
        name=name,
        model_types=model_types,
        auto_class="AutoModelForMaskedLM",
        head=Head(transform),
        chat_template=_CHAT_TEMPLATE,
        unquantized=head,
    )


_BERT_LIKE = ("bert", "deberta", "deberta-v2", "ernie", "megatron-bert", "nomic_bert", "roformer")
_ROBERTA_LIKE = ("roberta", "camembert", "data2vec-text", "gte", "mpnet", "xlm-roberta")
_ROBERTA_HEAD = ("lm_head.dense", "gelu", "lm_head.layer_norm")
_ALBERT_HEAD = ("predictions.dense", "predictions.activation", "predictions.LayerNorm")
_DISTILBERT_HEAD = ("vocab_transform", "activation", "vocab_layer_norm")
_ELECTRA_HEAD = ("generator_predictions",)

ENCODERS = [
    _encoder("BERT", *_BERT_LIKE, transform=("cls.predictions.transform",), head=("cls",)),
    _encoder("RoBERTa", *_ROBERTA_LIKE, transform=_ROBERTA_HEAD, head=("lm_head",)),
    _encoder("DistilBERT", "distilbert", transform=_DISTILBERT_HEAD, head=("vocab_transform", "vocab_projector")),
    _encoder("ALBERT", "albert", transform=_ALBERT_HEAD, head=("predictions",)),
    _encoder("ELECTRA", "electra", "convbert", transform=_ELECTRA_HEAD, head=(*_ELECTRA_HEAD, "generator_lm_head")),
    _encoder("ModernBERT", "modernbert", transform=("head",), head=("head", "decoder")),
    _encoder("EuroBERT", "eurobert", transform=(), head=("lm_head",)),
]
