"""
What the package knows of a model family beyond its forward: where the token of a logit sits, which layers LoRA adapts,
how its chat template ends a turn. To support another family, add an entry to `FAMILIES` (docs/adding-a-model.md).
"""

from dataclasses import dataclass

from transformers import PreTrainedConfig

# The published template opens an assistant turn after every conversation, asked for or not, so that a completion cut
# out of it would end in a header instead of an end of turn. Same tokens, with the header on request only, and with the
# assistant's words marked.
_LLADA_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if loop.first -%}{{- bos_token -}}{%- endif -%}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] | trim + '<|eot_id|>' -}}{%- endgeneration -%}"
    "{%- else -%}{{- message['content'] | trim + '<|eot_id|>' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}"
)


@dataclass(frozen=True)
class Family:
    """
    Facts of a model family.

    Args:
        logit_shift: 0 if position i's logits predict token i, 1 if they predict token i + 1 (Dream).
        lora_target_modules: default `target_modules` of a LoRA adapter; the output head must not match.
        end_of_turn: tokens that end an assistant turn in the chat template.
        training_chat_template: template to use in training if the tokenizer's own ignores `add_generation_prompt`.
    """

    logit_shift: int = 0
    lora_target_modules: str = "all-linear"
    end_of_turn: tuple[str, ...] = ()
    training_chat_template: str | None = None


FAMILIES: dict[str, Family] = {
    "llada": Family(
        # A pattern and not a list of names: the name `ff_out` would match the output head too
        lora_target_modules=r".*\.blocks\.\d+\.(q_proj|k_proj|v_proj|attn_out|ff_proj|up_proj|ff_out)",
        end_of_turn=("<|eot_id|>",),
        training_chat_template=_LLADA_TEMPLATE,
    ),
}


def family_of(config: PreTrainedConfig) -> Family:
    """The facts of a model's family; the defaults for one that has no entry."""
    return FAMILIES.get(config.model_type, Family())
