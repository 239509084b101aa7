"""What bidirectional decoders are, beyond their forward."""

from ..family import Blocks, Family, Head

_QWEN_TURN = ("<|im_end|>",)

DECODERS = [
    Family(name="iLLaDA", model_types=("illada",), auto_class="AutoModelForCausalLM", unquantized=("lm_head",)),
    Family(
        name="DreamReasoner",
        model_types=("Dream",),
        only_if=lambda config: hasattr(config, "block_size"),
        auto_class="AutoModelForCausalLM",
        mask_token_id=151669,
        attention=Blocks(32, "block_size"),
        end_of_turn=_QWEN_TURN,
        unquantized=("lm_head",),
    ),
    # Its logits predict the next token, as in the Qwen2 that it was made from
    Family(
        name="Dream",
        model_types=("Dream",),
        auto_class="AutoModelForCausalLM",
        logit_shift=1,
        end_of_turn=_QWEN_TURN,
        unquantized=("lm_head",),
    ),
    Family(
        name="A2D-Qwen",
        model_types=("a2d-qwen2", "a2d-qwen3"),
        auto_class="AutoModelForCausalLM",
        end_of_turn=_QWEN_TURN,
        unquantized=("lm_head",),
    ),
    Family(
        name="A2D-Llama",
        model_types=("a2d-llama",),
        auto_class="AutoModelForCausalLM",
        end_of_turn=("<|eot_id|>",),
        unquantized=("lm_head",),
    ),
    Family(
        name="LLaDA-MoE",
        model_types=("llada",),
        only_if=lambda config: hasattr(config, "num_experts"),
        auto_class="AutoModelForCausalLM",
        end_of_turn=("<|role_end|>",),
        # Experts are adapted where that is asked for: .*\.(self_attn|experts\.\d+)\.\w+_proj
        lora_target_modules=r".*\.self_attn\.(q|k|v|o)_proj",
        unquantized=("lm_head",),
    ),
    Family(
        name="Nemotron-Labs-Diffusion",
        model_types=("nemotron_labs_diffusion",),
        only_if=lambda config: getattr(config, "dlm_paradigm", "bidirectional") == "bidirectional",
        auto_class="AutoModelForCausalLM",
        end_of_turn=("<|im_end|>",),
        unquantized=("diffusion_head",),
    ),
    Family(
        name="SDAR",
        model_types=("sdar",),
        auto_class="AutoModelForCausalLM",
        mask_token_id=151669,
        attention=Blocks(4, "block_size"),
        sampling=(("confidence_threshold", 0.85),),
        end_of_turn=_QWEN_TURN,
        unquantized=("lm_head",),
    ),
    Family(
        name="Fast-dLLM v2",
        model_types=("Fast_dLLM_Qwen",),
        auto_class="AutoModelForCausalLM",
        mask_tokens=("|<MASK>|",),
        mask_token_id=151665,
        logit_shift=1,
        attention=Blocks(32, "bd_size", part=8),
        end_of_turn=_QWEN_TURN,
        unquantized=("lm_head",),
        sampling=(("confidence_threshold", 0.9),),
    ),
    Family(
        name="Stable-DiffCoder",
        model_types=("llama",),
        only_if=lambda config: "StableDiffcoderForCausalLM" in (config.architectures or ()),
        auto_class="StableDiffcoderForCausalLM",
        mask_token_id=5,
        attention=Blocks(4),
        unquantized=("lm_head",),
    ),
    Family(
        name="LLaDA2",
        model_types=("llada2_moe",),
        auto_class="AutoModelForCausalLM",
        attention=Blocks(32, "block_size"),
        end_of_turn=("<|role_end|>",),
        # Experts are adapted where that is asked for: .*\.(query_key_value|dense|experts\.\d+\.\w+_proj)
        lora_target_modules=r".*\.attention\.(query_key_value|dense)",
        unquantized=("lm_head",),
        sampling=(("confidence_threshold", 0.95),),
    ),
    Family(
        name="LFM2.5-Encoder-Diffusion",
        model_types=("lfm2",),
        only_if=lambda config: "Lfm2BidirectionalForMaskedLM" in (getattr(config, "architectures", None) or ()),
        auto_class="Lfm2BidirectionalForMaskedLM",
        mask_token_id=16,
        unquantized=("lm_head",),
    ),
    # Converted by a user: what is to be known of it is its soft cap
    Family(
        name="bidirectional Gemma", model_types=("gemma2", "gemma3_text"), head=Head(soft_cap="final_logit_softcapping")
    ),
]
