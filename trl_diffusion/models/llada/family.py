"""What LLaDA is, beyond its forward."""

from ..family import Family

# The published template opens an assistant turn after every conversation, asked for or not, so that a completion cut
# out of it would end in a header instead of an end of turn. Same tokens, with the header on request only, and with the
# assistant's words marked.
_TRAINING_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if loop.first -%}{{- bos_token -}}{%- endif -%}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] | trim + '<|eot_id|>' -}}{%- endgeneration -%}"
    "{%- else -%}{{- message['content'] | trim + '<|eot_id|>' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}"
)

LLADA = Family(
    name="LLaDA",
    model_types=("llada",),
    only_if=lambda config: not hasattr(config, "num_experts"),  # LLaDA-MoE has the same `model_type`
    auto_class="AutoModelForCausalLM",
    end_of_turn=("<|eot_id|>",),
    training_chat_template=_TRAINING_TEMPLATE,
    # A pattern and not a list of names: the name `ff_out` would match the output head too
    lora_target_modules=r".*\.blocks\.\d+\.(q_proj|k_proj|v_proj|attn_out|ff_proj|up_proj|ff_out)",
    unquantized=("model.transformer.ff_out",),
)
