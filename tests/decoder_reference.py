"""
Llama, Qwen2, Qwen3, Ministral 3 and LLaDA-MoE without the causal mask, in plain torch: the oracle of
tests/test_decoders.py.

Written from the description, one equation a line, and from none of the code that it is compared with. What a family has
(biases, norms of queries and keys, experts, a head of its own) is seen in its tensors, which are looked up by published
names.
"""

import math

import torch
import torch.nn.functional as F

WIDTH, INNER, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY, LAYERS = 32, 64, 4, 2, 8, 30, 2
EXPERTS_PER_TOKEN = 2


def published_tensors(biases=False, head_norms=False, tied=False, experts=0, renamed=(), seed=0):
    """Random tensors under the published names, large enough that every token matters to every other."""
    tensors = _tensors(biases, head_norms, tied, experts, seed)
    for ours, theirs in renamed:
        tensors = {name.replace(ours, theirs): tensor for name, tensor in tensors.items()}
    return tensors


def _tensors(biases, head_norms, tied, experts, seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (VOCABULARY, WIDTH), "model.norm.weight": (WIDTH,)}
    for layer in (f"model.layers.{i}" for i in range(LAYERS)):
        for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (heads * HEAD_DIM, WIDTH)
            if biases:
                shapes[f"{layer}.self_attn.{name}_proj.bias"] = (heads * HEAD_DIM,)
        if head_norms:
            shapes |= {f"{layer}.self_attn.{name}_norm.weight": (HEAD_DIM,) for name in "qk"}
        shapes[f"{layer}.self_attn.o_proj.weight"] = (WIDTH, HEADS * HEAD_DIM)
        if experts:
            shapes[f"{layer}.mlp.gate.weight"] = (experts, WIDTH)
        for mlp in [f"{layer}.mlp.experts.{e}" for e in range(experts)] or [f"{layer}.mlp"]:
            shapes |= {f"{mlp}.{name}_proj.weight": (INNER, WIDTH) for name in ("gate", "up")}
            shapes[f"{mlp}.down_proj.weight"] = (WIDTH, INNER)
        shapes |= {f"{layer}.{name}_layernorm.weight": (WIDTH,) for name in ("input", "post_attention")}
    if not tied:
        shapes["lm_head.weight"] = (VOCABULARY, WIDTH)
    tensors = {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: tensor + ("norm" in name) for name, tensor in tensors.items()}


def decoder_logits(tensors, input_ids, real=None, *, theta, eps, yarn=None, renamed=(), sees=None):
    """`(B, L, V)` logits; `real` is `(B, L)`, one at real tokens; `sees` is `(B, L, L)`, who attends to whom."""
    real = torch.ones_like(input_ids) if real is None else real
    sees = real.bool().unsqueeze(1) if sees is None else sees
    for ours, theirs in renamed:
        tensors = {name.replace(theirs, ours): tensor for name, tensor in tensors.items()}

    def norm(x, name):
        return tensors[name] * x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()

    def project(x, name):
        return x @ tensors[f"{name}.weight"].T + tensors.get(f"{name}.bias", 0)

    def feed_forward(x, name):
        return project(F.silu(project(x, f"{name}.gate_proj")) * project(x, f"{name}.up_proj"), f"{name}.down_proj")

    x = tensors["model.embed_tokens.weight"][input_ids]
    for layer in (f"model.layers.{i}" for i in range(LAYERS)):
        normed = norm(x, f"{layer}.input_layernorm.weight")
        query, key, value = (
            project(normed, f"{layer}.self_attn.{name}_proj").unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
            for name in "qkv"
        )
        if f"{layer}.self_attn.q_norm.weight" in tensors:
            query, key = norm(query, f"{layer}.self_attn.q_norm.weight"), norm(key, f"{layer}.self_attn.k_norm.weight")
        query, key = turn(query, theta, yarn), turn(key, theta, yarn)
        if yarn:  # Ministral 3: sharper beyond the context that it was trained on
            times = torch.arange(input_ids.shape[1]) // yarn["original_max_position_embeddings"]
            query = query * (1 + yarn["llama_4_scaling_beta"] * (1 + times).log())[:, None]
        key, value = (each.repeat_interleave(HEADS // KV_HEADS, dim=1) for each in (key, value))
        scores = (query @ key.mT / HEAD_DIM**0.5).masked_fill(~sees.unsqueeze(1), -torch.inf)
        x = x + project((scores.softmax(-1) @ value).transpose(1, 2).flatten(2), f"{layer}.self_attn.o_proj")
        normed = norm(x, f"{layer}.post_attention_layernorm.weight")
        if f"{layer}.mlp.gate.weight" not in tensors:
            x = x + feed_forward(normed, f"{layer}.mlp")
            continue
        probabilities = project(normed, f"{layer}.mlp.gate").softmax(-1)
        least = probabilities.sort(dim=-1, descending=True).values[..., EXPERTS_PER_TOKEN - 1, None]
        for expert, weight in enumerate(probabilities.masked_fill(probabilities < least, 0).unbind(-1)):
            x = x + weight[..., None] * feed_forward(normed, f"{layer}.mlp.experts.{expert}")
    head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    return norm(x, "model.norm.weight") @ head.T


def frequencies(theta, yarn=None, size=HEAD_DIM):
    plain = torch.tensor([theta ** (-2 * i / size) for i in range(size // 2)])
    if yarn is None:
        return plain

    def pair(turns):
        """The pair of a head that turns so many times in the original context (YaRN, arXiv 2309.00071)."""
        length = yarn["original_max_position_embeddings"] / (2 * math.pi * turns)
        return HEAD_DIM * math.log(length) / (2 * math.log(theta))

    low, high = max(math.floor(pair(yarn["beta_fast"])), 0), min(math.ceil(pair(yarn["beta_slow"])), HEAD_DIM - 1)
    slowed = ((torch.arange(HEAD_DIM // 2) - low) / (high - low)).clamp(0, 1)
    return plain * (1 - slowed) + plain / yarn["factor"] * slowed


def turn(x, theta, yarn=None):
    """Turn the pair (i, i + D / 2) of each head `(B, heads, L, D)` by position times frequency i."""
    angles = torch.arange(x.shape[2])[:, None] * frequencies(theta, yarn, x.shape[-1])
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
