"""
The law: with a block cache, an answer is that of a naive sampler that runs the whole canvas each step, in whose layers
the keys and values of what is outside of the block are put back to those of when the block began.
"""

import math
from functools import partial

import pytest
import torch
from conftest import make_model
from encoders import make_encoder
from test_decoders import FOLDERS
from test_generation import EOS, MASK, PROMPTS, generate

from trl_diffusion.models import sampler

KEYS_AND_VALUES = ("k_proj", "v_proj", ".key", ".value")
CANVAS = {"max_new_tokens": 8, "block_length": 4, "eos_token_id": [1000], "pad_token_id": EOS}  # no answer ends


def make_bert():
    """Whose positions are learnt, and which is asked as a method only for the sake of the others."""
    model = make_encoder("bert", mask_token_id=MASK)
    model.generate = partial(sampler.generate, model)
    return model


def make_eager():
    """Whose masks are added to scores."""
    model = make_model()
    model.set_attn_implementation("eager")
    return model


MODELS = {
    "LLaDA": make_model,
    "LLaDA, eager": make_eager,
    "Dream": FOLDERS["Dream"].model,
    "A2D-Qwen3": FOLDERS["A2D-Qwen3"].model,
    "BERT": make_bert,
}


class Frozen:
    """Layers whose keys and values, at some places, are those of another forward."""

    def __init__(self, model):
        self.kept, self.places, self.keeps = {}, [], False
        for name, module in model.named_modules():
            if name.endswith(KEYS_AND_VALUES):
                module.register_forward_hook(lambda _, args, output, name=name: self.put_back(name, output))

    def put_back(self, name, output):
        if self.keeps:
            self.kept[name] = output.clone()
        output = output.clone()
        if self.places:
            output[:, self.places] = self.kept[name][:, self.places]
        return output


def naive(model, prompt, kind, shift=0, refresh=None, per_step=1, scale=0.0, length=8, block=4):
    """The greedy answer to one prompt."""
    frozen = [Frozen(model) for _ in range(2 if scale else 1)]
    tokens = prompt + [MASK] * length
    for first in range(len(prompt), len(prompt) + length, block):
        for step in range(block // per_step):
            logits = []
            for branch, each in enumerate(frozen):
                for other in frozen:
                    other.keeps, other.places = False, []
                begins = step % refresh == 0 if refresh else step == 0
                inside = range(max(first - shift, 0), first + block if kind == "dual" else len(tokens))
                each.keeps, each.places = begins, [] if begins else [i for i in range(len(tokens)) if i not in inside]
                row = [MASK] * len(prompt) + tokens[len(prompt) :] if branch else tokens
                with torch.no_grad():
                    logits.append(model(input_ids=torch.tensor([row])).logits[0])
            guided = logits[0] if not scale else (1 + scale) * logits[0] - scale * logits[1]
            guided[:, MASK] = -math.inf
            log_probs = guided.log_softmax(-1)
            best = {i: log_probs[max(i - shift, 0)].max(-1) for i in range(first, first + block) if tokens[i] == MASK}
            for i in sorted(best, key=lambda i: -best[i].values.item())[:per_step]:
                tokens[i] = best[i].indices.item()
    return tokens[len(prompt) :]


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("kind", ["prefix", "dual"])
def test_what_is_outside_is_as_it_was_when_the_block_began(family, kind):
    shift, changed = int(family == "Dream"), 0
    for options in ({"refresh": 2, "scale": 1.5}, {"per_step": 2}) if family == "LLaDA" else ({},):
        given = {"cache_refresh": options.get("refresh"), "cfg_scale": options.get("scale", 0.0)}
        given |= {"steps": 8 // options.get("per_step", 1), **CANVAS}
        found = generate(MODELS[family](), PROMPTS, block_cache=kind, **given)
        assert found == [naive(MODELS[family](), prompt, kind, shift, **options) for prompt in PROMPTS]
        changed += found != generate(MODELS[family](), PROMPTS, **given | {"cache_refresh": None})
    assert changed  # or else the cache could be anything


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("kind", ["prefix", "dual"])
def test_computed_anew_in_each_step_it_is_the_exact_sampler(family, kind):
    model = MODELS[family]()
    for canvas in ({**CANVAS, "block_length": 8}, {**CANVAS, "confidence_threshold": 0.3}):
        exact = generate(model, PROMPTS, **canvas)
        assert generate(model, PROMPTS, block_cache=kind, cache_refresh=1, **canvas) == exact


@pytest.mark.parametrize(
    "more", [{"confidence_threshold": 0.3}, {"remasking": "ancestral", "steps": 16}, {"temperature": 1.0}], ids=str
)
def test_an_answer_depends_on_its_own_prompt_only(more):
    """Rows are ahead of each other, and are computed anew at other times."""
    model, given = make_model(init_std=0.4), {"seed": 3, "block_cache": "dual", "cache_refresh": 2, **CANVAS, **more}
    assert generate(model, PROMPTS, **given) == [generate(model, [prompt], **given)[0] for prompt in PROMPTS]


@pytest.mark.parametrize(("kind", "shift"), [("prefix", 0), ("dual", 0), ("dual", 1)])
def test_a_step_runs_what_is_said(kind, shift):
    """All when a block begins, then the block, with what follows it or without; and both once, to see if it fits."""
    model, prompt, run = MODELS["Dream" if shift else "LLaDA"](), PROMPTS[0], []
    model.get_input_embeddings().register_forward_hook(lambda _, args, output: run.append(args[0].shape[1]))
    generate(model, [prompt], block_cache=kind, **CANVAS)
    whole, rest = len(prompt) + 8, (4, 4) if kind == "dual" else (8, 4)
    first, second = ([whole, *[part + shift] * 3] for part in rest)
    assert run == [whole, whole, rest[0] + shift, *first[1:], *second]


def test_models_that_cannot_are_refused():
    ids = torch.tensor(PROMPTS[:1])
    with pytest.raises(
        ValueError, match=r"`block_cache='dual'` needs a model.*does not take them. Leave `block_cache`"
    ):
        sampler.generate(make_encoder("modernbert", mask_token_id=MASK), ids, max_new_tokens=4, block_cache="dual")
    with pytest.raises(ValueError, match="`RobertaForMaskedLM` computes something else"):  # counts positions from two
        sampler.generate(make_encoder("roberta", mask_token_id=MASK), ids, max_new_tokens=4, block_cache="dual")
    with pytest.raises(ValueError, match="SDAR is a block diffusion model, whose cache is exact"):
        FOLDERS["SDAR"].model().generate(ids, max_new_tokens=4, block_cache="dual")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_cache": "all"}, "`block_cache` must be None or one of"),
        ({"cache_refresh": 2}, "`cache_refresh=2` is for `block_cache`, which is off"),
        ({"block_cache": "dual", "cache_refresh": 0}, "`cache_refresh` must be at least 1 step, got 0"),
        ({"block_cache": "dual", "cache_refresh": 1.5}, "`cache_refresh` must be a whole number"),
    ],
)
def test_values_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_model().generate(torch.tensor(PROMPTS[:1]), max_new_tokens=4, **arguments)
