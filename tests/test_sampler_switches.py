"""
The sampler's switches against a naive sampler, written here for one prompt at a time from what the papers say of each.
"""

import dataclasses
import itertools
import math
from itertools import takewhile

import pytest
import torch
from conftest import make_model, make_tokenizer
from test_decoders import FOLDERS
from test_generation import EOS, MASK, PROMPTS, assert_frequencies, cut_after_end, generate, naive_logits

from trl_diffusion.cli.answering import GenerateArguments, SamplingArguments
from trl_diffusion.evaluation.answers import Answerer
from trl_diffusion.evaluation.prompts import Prompts
from trl_diffusion.models.sampler_arguments import SamplerArguments

EOT = 5
ENDS = [EOS, EOT]


def sure(log_probs, token, how):
    """Of a prediction, by the names of Dream."""
    probabilities = log_probs.exp()
    if how == "entropy":
        return sum(p * math.log(p) for p in probabilities.tolist() if p > 0)
    if how == "topk_margin":
        best = sorted(probabilities.tolist())
        return best[-1] - best[-2]
    return log_probs[token].item()


def naive(
    model, prompt, length, block, per_step=1, *, how="low_confidence", threshold=None, no_eos=False, ends_last=False
):
    """The response, and how many forwards it took; without stopping early."""
    tokens, forwards = prompt + [MASK] * length, 0
    for first in range(len(prompt), len(prompt) + length, block):
        while gaps := [i for i in range(first, first + block) if tokens[i] == MASK]:
            logits, forwards = naive_logits(model, tokens, len(prompt), 0.0), forwards + 1
            if no_eos:
                logits[:, EOS] = -math.inf
            log_probs = logits.log_softmax(-1)
            best = {i: log_probs[i].argmax().item() for i in gaps}
            order = sorted(
                gaps, key=lambda i: (ends_last and best[i] in ENDS, -sure(log_probs[i], best[i], how))
            )  # fmt: skip
            kept = order[:per_step]
            if threshold is not None:
                kept = order[:1] + [i for i in order[1:] if log_probs[i, best[i]].exp() >= threshold]
            for i in kept:
                tokens[i] = best[i]
    return tokens[len(prompt) :], forwards


SWITCHES = {
    "entropy": ({"remasking": "entropy"}, {"how": "entropy"}),
    "topk_margin": ({"remasking": "topk_margin"}, {"how": "topk_margin"}),
    "logits_eos_inf": ({"logits_eos_inf": True}, {"no_eos": True}),
    "confidence_eos_eot_inf": ({"confidence_eos_eot_inf": True}, {"ends_last": True}),
    "both": ({"logits_eos_inf": True, "confidence_eos_eot_inf": True}, {"no_eos": True, "ends_last": True}),
    "margin, ends last": (
        {"remasking": "topk_margin", "confidence_eos_eot_inf": True},
        {"how": "topk_margin", "ends_last": True},
    ),
}


def ending_model(seed):
    """A model that is fond of ends of text and of turns."""
    model = make_model(seed=seed)
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        head[ENDS] *= 3
    return model


@pytest.mark.parametrize("per_step", [1, 2])
@pytest.mark.parametrize("switch", SWITCHES)
def test_each_switch_is_what_its_paper_says(switch, per_step):
    given, by_hand = SWITCHES[switch]
    changed = 0
    for seed in range(3):
        model = ending_model(seed)
        canvas = {
            "max_new_tokens": 8,
            "block_length": 4,
            "steps": 8 // per_step,
            "eos_token_id": ENDS,
            "pad_token_id": EOS,
        }
        found = generate(model, PROMPTS, **canvas, **given)
        by_hands = [naive(model, prompt, 8, 4, per_step, **by_hand)[0] for prompt in PROMPTS]
        assert found == [cut_after_end(response, ENDS, EOS) for response in by_hands]
        changed += found != generate(model, PROMPTS, **canvas)
    assert changed


class Forwards:
    """Counts rows of forwards."""

    def __init__(self, model):
        self.number = self.rows = 0
        model.model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module, args, kwargs):
        ids = kwargs.get("input_ids", args[0] if args else None)
        self.number, self.rows = self.number + 1, self.rows + len(ids)


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.9, 1.0])
def test_a_threshold_reveals_what_is_sure_in_fewer_forwards(threshold):
    """As many as by hand: a row that has filled its block is not run again for the others'."""
    model = make_model(seed=1, init_std=0.4)
    canvas = {"max_new_tokens": 8, "block_length": 4, "eos_token_id": [1000], "pad_token_id": EOS}  # no answer ends
    by_hand = [naive(model, prompt, 8, 4, threshold=threshold) for prompt in PROMPTS]
    expected = [response for response, _ in by_hand]
    counted = Forwards(model)
    assert generate(model, PROMPTS, **canvas, confidence_threshold=threshold) == expected
    assert counted.rows == sum(forwards for _, forwards in by_hand)
    assert counted.rows <= 8 * len(PROMPTS) and (threshold > 0.2 or counted.rows < 8 * len(PROMPTS))


# ------------------------------------------------------------------------------------------------- ancestral sampling


def test_in_ancestral_sampling_a_step_that_reveals_nothing_costs_nothing():
    """
    A token's step is any of T, so that L tokens have so many different ones as L balls fill of T boxes: T (1 - (1 -
    1/T)^L) in expectation (RADD), with a variance that is known too.
    """
    rows, prompt, ends = 150, PROMPTS[0], {"eos_token_id": [1000], "pad_token_id": EOS}  # no answer ends
    model = make_model(d_model=8, n_heads=2, n_layers=1, mlp_hidden_size=8)
    for length, block, steps in ((8, 8, 8), (8, 4, 64), (6, 3, 4)):
        counted, canvas = Forwards(model), {"max_new_tokens": length, "block_length": block, "steps": steps}
        generate(model, [prompt], **canvas, **ends, remasking="ancestral", seed=0, num_return_sequences=rows)
        blocks, of_block = length // block, steps // (length // block)
        empty, two_empty = (1 - 1 / of_block) ** block, (1 - 2 / of_block) ** block
        expected = blocks * of_block * (1 - empty)
        variance = blocks * (of_block * empty + of_block * (of_block - 1) * two_empty - (of_block * empty) ** 2)
        assert abs(counted.rows / rows - expected) < 4 * (variance / rows) ** 0.5
        assert counted.rows < rows * min(steps, length)


def test_ancestral_texts_have_the_probabilities_of_all_orders():
    """Of two tokens: both at once with probability 1/T, or else one after the other, in either order."""
    steps, prompt = 3, [5, 3]
    model = make_model(seed=10, vocab_size=6, eos_token_id=None, pad_token_id=None)
    tokens = [token for token in range(6) if token != MASK]

    def probabilities(*response):
        return naive_logits(model, [*prompt, *response], len(prompt), 0.0)[-2:].double().softmax(-1)

    at_once = probabilities(MASK, MASK)
    joint = {}
    for a, b in itertools.product(tokens, tokens):
        left_first = at_once[0, a] * probabilities(a, MASK)[1, b]
        right_first = at_once[1, b] * probabilities(MASK, b)[0, a]
        apart = (left_first + right_first) / 2
        joint[a, b] = float(at_once[0, a] * at_once[1, b] / steps + apart * (1 - 1 / steps))
    arguments = {"max_new_tokens": 2, "steps": steps, "temperature": 1.0, "remasking": "ancestral", "seed": 2}
    samples = generate(model, [prompt], num_return_sequences=1500, **arguments)
    assert_frequencies([tuple(s) for s in samples], joint)


def test_ancestral_answers_depend_on_their_own_prompt_only():
    model, given = make_model(), {"max_new_tokens": 8, "steps": 12, "block_length": 4, "remasking": "ancestral"}
    given |= {"temperature": 1.0, "seed": 3, "eos_token_id": ENDS, "pad_token_id": EOS}
    assert generate(model, PROMPTS, **given) == [generate(model, [prompt], **given)[0] for prompt in PROMPTS]


@pytest.mark.parametrize("name", ["SDAR", "Fast-dLLM v2"])
def test_block_diffusion_models_sample_so_too(name):
    """Steps in which nothing is revealed are not run, and those that are left reveal all."""
    model, run = FOLDERS[name].model(), []
    model.get_input_embeddings().register_forward_hook(lambda _, args, output: run.append(args[0].shape))
    given = {"max_new_tokens": 8, "eos_token_id": [1000], "pad_token_id": EOS, "confidence_threshold": 1}
    numbers = {}
    for remasking in ("random", "ancestral"):
        run.clear()
        answers = [generate(model, PROMPTS[:1], remasking=remasking, seed=seed, **given)[0] for seed in range(4)]
        assert all(MASK not in answer for answer in answers)
        numbers[remasking] = len(run)
    assert numbers["ancestral"] < numbers["random"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"remasking": "random", "steps": 9}, "at most `max_new_tokens` .8., but for `remasking='ancestral'`, got 9"),
        ({"remasking": "ancestral", "confidence_threshold": 0.9}, "`remasking` at 'low_confidence'"),
        ({"remasking": "ancestral", "confidence_eos_eot_inf": True}, "`remasking='ancestral'` does not"),
        ({"confidence_threshold": 0.0}, "`confidence_threshold` must be None or above 0 and at most 1, got 0.0"),
        ({"confidence_threshold": 1.5}, "`confidence_threshold` must be"),
        ({"confidence_threshold": 0.9, "steps": 4}, "leave `steps` out"),
        ({"confidence_threshold": 0.9, "remasking": "entropy"}, "`remasking` at 'low_confidence'"),
        ({"confidence_eos_eot_inf": True, "remasking": "random"}, "orders by confidence"),
        ({"logits_eos_inf": 1}, "`logits_eos_inf` must be True or False, got 1"),
        (
            {"logits_eos_inf": True, "eos_token_id": []},
            "`logits_eos_inf=True` goes by `eos_token_id`, and there is none",
        ),
    ],
)
def test_switches_that_do_not_go_together_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_model().generate(torch.tensor(PROMPTS[:1]), max_new_tokens=8, **arguments)


def test_the_command_line_has_the_samplers_arguments():
    ours = {field.name: field.default for field in dataclasses.fields(SamplerArguments)}
    for name in ("num_return_sequences", "return_dict_in_generate"):
        del ours[name]
    theirs = {f.name: f.default for f in dataclasses.fields(SamplingArguments) if f.name != "use_cpu"}
    assert theirs == ours | {"seed": 0}
    given = GenerateArguments(prompts=["hi"], steps=4, logits_eos_inf=True, max_new_tokens=8).sampler()
    assert dataclasses.asdict(SamplerArguments(**given))["logits_eos_inf"] is True and "seed" not in given


def test_what_answers_prompts_knows_the_end_of_a_turn():
    """Without being told: its answers are those of `generate` with both ends, up to the first."""
    tokenizer, canvas, changed = make_tokenizer(), {"max_new_tokens": 8, "confidence_eos_eot_inf": True}, 0
    prompts = Prompts([{"prompt": ""}] * len(PROMPTS), PROMPTS, conversational=False)
    for seed in range(3):
        model = ending_model(seed)
        found = Answerer(model, tokenizer, prompts, 1, 0, canvas)([*range(len(PROMPTS))])
        both, one = (generate(model, PROMPTS, **canvas, eos_token_id=ends) for ends in (ENDS, [EOS]))
        expected, without = ([list(takewhile(lambda t: t not in ENDS, row)) for row in each] for each in (both, one))
        assert [ids for (ids,) in found] == expected
        changed += expected != without
    assert changed
