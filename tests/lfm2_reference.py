"""
LFM2 that sees both sides, in plain torch: the oracle of tests/test_lfm2.py, written from the description, and from none
of the code that it is compared with.
"""

import torch
import torch.nn.functional as F
from decoder_reference import HEAD_DIM, HEADS, INNER, KV_HEADS, VOCABULARY, WIDTH, turn

LAYERS = ("conv", "full_attention", "conv")
THETA = 1000000.0
REACH = 3  # tokens that a convolution sees: one, and its neighbours


def published_tensors(seed=0):
    """Random tensors under the published names; the head is the embedding, and not among them."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"lfm2.embed_tokens.weight": (VOCABULARY, WIDTH), "lfm2.embedding_norm.weight": (WIDTH,)}
    for number, kind in enumerate(LAYERS):
        layer = f"lfm2.layers.{number}"
        if kind == "conv":
            shapes |= {
                f"{layer}.conv.in_proj.weight": (3 * WIDTH, WIDTH),
                f"{layer}.conv.out_proj.weight": (WIDTH,) * 2,
            }
            shapes[f"{layer}.conv.conv.weight"] = (WIDTH, 1, REACH)
        else:
            for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
                shapes[f"{layer}.self_attn.{name}_proj.weight"] = (heads * HEAD_DIM, WIDTH)
            shapes[f"{layer}.self_attn.out_proj.weight"] = (WIDTH, HEADS * HEAD_DIM)
            shapes |= {f"{layer}.self_attn.{name}_layernorm.weight": (HEAD_DIM,) for name in "qk"}
        shapes |= {f"{layer}.feed_forward.{name}.weight": (INNER, WIDTH) for name in ("w1", "w3")}
        shapes[f"{layer}.feed_forward.w2.weight"] = (WIDTH, INNER)
        shapes |= {f"{layer}.{name}_norm.weight": (WIDTH,) for name in ("operator", "ffn")}
    tensors = {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: tensor + ("norm" in name) for name, tensor in tensors.items()}


def logits_of(tensors, input_ids, eps=1e-5):
    """`(B, L, V)` logits of rows without padding."""

    def norm(x, name):
        return tensors[f"{name}.weight"] * x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()

    def project(x, name):
        return x @ tensors[f"{name}.weight"].T

    def convolved(x, name):
        before, after, inner = project(x, f"{name}.in_proj").chunk(3, dim=-1)
        gated, weight = before * inner, tensors[f"{name}.conv.weight"][:, 0]
        beyond = torch.zeros_like(gated[:, :1])
        padded = torch.cat([beyond, gated, beyond], dim=1)  # left neighbour, itself, right neighbour
        mixed = sum(weight[:, i] * padded[:, i : i + gated.shape[1]] for i in range(REACH))
        return project(after * mixed, f"{name}.out_proj")

    def attended(x, name):
        query, key, value = (
            project(x, f"{name}.{n}_proj").unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for n in "qkv"
        )
        query, key = (turn(norm(each, f"{name}.{n}_layernorm"), THETA) for n, each in (("q", query), ("k", key)))
        key, value = (each.repeat_interleave(HEADS // KV_HEADS, dim=1) for each in (key, value))
        answer = (query @ key.mT / HEAD_DIM**0.5).softmax(-1) @ value
        return project(answer.transpose(1, 2).flatten(2), f"{name}.out_proj")

    x = tensors["lfm2.embed_tokens.weight"][input_ids]
    for number, kind in enumerate(LAYERS):
        layer = f"lfm2.layers.{number}"
        normed = norm(x, f"{layer}.operator_norm")
        x = x + (convolved(normed, f"{layer}.conv") if kind == "conv" else attended(normed, f"{layer}.self_attn"))
        normed = norm(x, f"{layer}.ffn_norm")
        gate = F.silu(project(normed, f"{layer}.feed_forward.w1")) * project(normed, f"{layer}.feed_forward.w3")
        x = x + project(gate, f"{layer}.feed_forward.w2")
    return norm(x, "lfm2.embedding_norm") @ tensors["lfm2.embed_tokens.weight"].T
