"""
LLaDA2 in plain torch, the oracle of its rows in tests/test_decoders.py: written from the description, one equation a
line, and from none of the code that it is compared with.

Token by token where experts are chosen: in groups by a score with a bias, weighed by the score without it.
"""

import torch
import torch.nn.functional as F
from decoder_reference import HEAD_DIM, HEADS, INNER, KV_HEADS, LAYERS, VOCABULARY, WIDTH, turn

EXPERTS, GROUPS, KEPT_GROUPS, CHOSEN, EXPERT_INNER, FACTOR = 12, 3, 2, 3, 16, 2.5
TURNED = HEAD_DIM // 2  # of a head, the part that is turned by position
SHARES = {"query": HEADS, "key": KV_HEADS, "value": KV_HEADS}  # of the projection, one after the other


def published_tensors(seed=0):
    """Random tensors under the published names; the first layer is dense."""
    generator = torch.Generator().manual_seed(seed)
    embedding = (VOCABULARY, WIDTH)
    shapes = {"model.word_embeddings.weight": embedding, "model.norm.weight": (WIDTH,), "lm_head.weight": embedding}
    for number in range(LAYERS):
        layer = f"model.layers.{number}"
        shapes[f"{layer}.attention.query_key_value.weight"] = (sum(SHARES.values()) * HEAD_DIM, WIDTH)
        shapes[f"{layer}.attention.dense.weight"] = (WIDTH, HEADS * HEAD_DIM)
        shapes |= {f"{layer}.attention.{name}_layernorm.weight": (HEAD_DIM,) for name in ("query", "key")}
        shapes |= {f"{layer}.{name}_layernorm.weight": (WIDTH,) for name in ("input", "post_attention")}
        parts = {f"{layer}.mlp": INNER}
        if number:
            shapes |= {f"{layer}.mlp.gate.weight": (EXPERTS, WIDTH), f"{layer}.mlp.gate.expert_bias": (EXPERTS,)}
            parts = {f"{layer}.mlp.experts.{expert}": EXPERT_INNER for expert in range(EXPERTS)}
            parts[f"{layer}.mlp.shared_experts"] = EXPERT_INNER
        for part, width in parts.items():
            shapes |= {f"{part}.{name}_proj.weight": (width, WIDTH) for name in ("gate", "up")}
            shapes[f"{part}.down_proj.weight"] = (WIDTH, width)
    tensors = {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: tensor + ("norm" in name) for name, tensor in tensors.items()}


def decoder_logits(tensors, input_ids, *, theta, eps, sees):
    """`(B, L, V)` logits; `sees` is `(B, L, L)`, who attends to whom."""

    def norm(x, name):
        return tensors[f"{name}.weight"] * x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()

    def feed_forward(x, name):
        gate, up, down = (tensors[f"{name}.{part}_proj.weight"].T for part in ("gate", "up", "down"))
        return (F.silu(x @ gate) * (x @ up)) @ down

    def experts(x, name):
        scores = torch.sigmoid(x @ tensors[f"{name}.gate.weight"].T)
        chosen = [_chosen(token, tensors[f"{name}.gate.expert_bias"]) for token in scores.flatten(0, -2)]
        weights = torch.stack(chosen).view(scores.shape) * scores
        weights = FACTOR * weights / weights.sum(-1, keepdim=True)
        answers = [weights[..., e, None] * feed_forward(x, f"{name}.experts.{e}") for e in range(EXPERTS)]
        return sum(answers) + feed_forward(x, f"{name}.shared_experts")

    def positioned(x):
        return torch.cat([turn(x[..., :TURNED], theta), x[..., TURNED:]], dim=-1)

    x = tensors["model.word_embeddings.weight"][input_ids]
    for number in range(LAYERS):
        layer = f"model.layers.{number}"
        projected = norm(x, f"{layer}.input_layernorm") @ tensors[f"{layer}.attention.query_key_value.weight"].T
        heads = projected.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
        query, key, value = heads.split(list(SHARES.values()), dim=1)
        query, key = (
            positioned(norm(each, f"{layer}.attention.{name}_layernorm"))
            for name, each in (("query", query), ("key", key))
        )
        key, value = (each.repeat_interleave(HEADS // KV_HEADS, dim=1) for each in (key, value))
        scores = (query @ key.mT / HEAD_DIM**0.5).masked_fill(~sees.unsqueeze(1), -torch.inf)
        attended = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        x = x + attended @ tensors[f"{layer}.attention.dense.weight"].T
        normed = norm(x, f"{layer}.post_attention_layernorm")
        x = x + (experts if number else feed_forward)(normed, f"{layer}.mlp")
    return norm(x, "model.norm") @ tensors["lm_head.weight"].T


def _chosen(scores, bias):
    """`(E,)` one at the experts that a token is given to."""
    choice = (scores + bias).tolist()
    size = EXPERTS // GROUPS
    groups = [list(range(first, first + size)) for first in range(0, EXPERTS, size)]
    worth = [sum(sorted((choice[e] for e in group), reverse=True)[:2]) for group in groups]
    best = sorted(range(GROUPS), key=lambda group: -worth[group])[:KEPT_GROUPS]
    allowed = [expert for group in best for expert in groups[group]]
    chosen = sorted(allowed, key=lambda expert: -choice[expert])[:CHOSEN]
    return torch.tensor([float(expert in chosen) for expert in range(EXPERTS)])
