"""
The law: `generate` is the published sampler, and a row's response is a function of its own prompt and the seed.

The sampler is compared with a naive one, written here from the paper (LLaDA, section 2.4 and appendix A.3) for one
prompt at a time: every step computes the whole sequence, nothing is batched, skipped or stopped early.
"""

import itertools
import math

import pytest
import torch
from conftest import make_model, make_tokenizer
from counters import LiveBytes
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig

from trl_diffusion.models import sampler
from trl_diffusion.models.llada.family import LLADA

MASK, EOS, PAD = 2, 0, 0
# Lengths and contents differ; no mask token; the first pair differs in its last token only
PROMPTS = [[5, 11, 3, 9, 28, 17, 4], [5, 11, 3, 9, 28, 17, 6], [7, 23], [8], [19, 10, 0, 13], [12, 12, 12]]
SCHEDULES = {
    "one_block": {"max_new_tokens": 8},
    "blocks": {"max_new_tokens": 8, "block_length": 2},
    "blocks_of_one": {"max_new_tokens": 5, "block_length": 1},
    "two_a_step": {"max_new_tokens": 8, "steps": 4, "block_length": 4},
    "uneven_steps": {"max_new_tokens": 8, "steps": 3},
    "uneven_steps_in_blocks": {"max_new_tokens": 12, "steps": 8, "block_length": 6},
    "all_at_once": {"max_new_tokens": 6, "steps": 1},
    "guided": {"max_new_tokens": 8, "block_length": 4, "cfg_scale": 1.5},
}
SAMPLING = {
    "greedy": {},
    "hot": {"temperature": 1.0},
    "random_order": {"remasking": "random"},
    "hot_random_order": {"temperature": 0.7, "remasking": "random"},
    "hot_guided": {"temperature": 1.0, "cfg_scale": 0.8},
}


def naive_response(
    model, prompt, max_new_tokens, steps=None, block_length=None, cfg_scale=0.0, ends=(EOS,), pad=PAD
) -> tuple[list[int], int]:
    """Response to one prompt by low-confidence remasking, and after how many steps its text was decided."""
    block_length = block_length or max_new_tokens
    num_blocks = max_new_tokens // block_length
    steps_per_block = (steps or max_new_tokens) // num_blocks
    tokens, decided = prompt + [MASK] * max_new_tokens, None
    for block in range(num_blocks):
        first = len(prompt) + block * block_length
        for step in range(steps_per_block):
            count = block_length // steps_per_block + (step < block_length % steps_per_block)
            log_probs = naive_logits(model, tokens, len(prompt), cfg_scale).log_softmax(-1)
            best = {i: log_probs[i].max(-1) for i in range(first, first + block_length) if tokens[i] == MASK}
            for i in sorted(best, key=lambda i: -best[i].values.item())[:count]:
                tokens[i] = best[i].indices.item()
            until_gap = list(itertools.takewhile(lambda token: token != MASK, tokens[len(prompt) :]))
            if decided is None and (set(until_gap) & set(ends) or MASK not in tokens):
                decided = block * steps_per_block + step + 1
    return cut_after_end(tokens[len(prompt) :], ends, pad), decided


def naive_logits(model, tokens, prompt_length, cfg_scale):
    with torch.no_grad():
        conditional = model(input_ids=torch.tensor([tokens])).logits[0]
        unprompted = [MASK] * prompt_length + tokens[prompt_length:]
        unconditional = model(input_ids=torch.tensor([unprompted])).logits[0]
    logits = (1 + cfg_scale) * conditional - cfg_scale * unconditional
    logits[:, MASK] = -math.inf
    return logits


def cut_after_end(response, ends, pad):
    ended = [i for i, token in enumerate(response) if token in ends]
    return response if not ended else response[: ended[0] + 1] + [pad] * (len(response) - ended[0] - 1)


def generate(model, prompts, **kwargs) -> list[list[int]]:
    """Responses to a left-padded batch."""
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    sequences = model.generate(ids, attention_mask=mask, **kwargs)
    repeated = ids.repeat_interleave(kwargs.get("num_return_sequences", 1), 0)
    assert torch.equal(sequences[:, :width], repeated)
    return sequences[:, width:].tolist()


def one_by_one(model, prompts, **kwargs):
    return [generate(model, [prompt], **kwargs)[0] for prompt in prompts]


# ----------------------------------------------------------------------------------------------- the published sampler


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ends", [(0,), (0, 5, 9, 14, 21)], ids=["one_end", "many_ends"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_generate_is_the_naive_sampler(schedule, ends, seed):
    model, arguments = make_model(seed=seed), SCHEDULES[schedule]
    expected = [naive_response(model, prompt, **arguments, ends=ends, pad=1)[0] for prompt in PROMPTS]
    assert generate(model, PROMPTS, **arguments, eos_token_id=list(ends), pad_token_id=1) == expected
    assert len({tuple(response) for response in expected}) > 1


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampling", SAMPLING)
def test_a_response_depends_on_its_own_prompt_only(sampling, schedule):
    model, arguments = make_model(), {"seed": 3, **SCHEDULES[schedule], **SAMPLING[sampling]}
    ends = {"eos_token_id": [0, 5, 9, 14, 21]}
    batched = generate(model, PROMPTS, **arguments, **ends)
    assert batched == one_by_one(model, PROMPTS, **arguments, **ends)
    assert batched[::-1] == generate(model, PROMPTS[::-1], **arguments, **ends)


def test_guidance_is_computed_with_the_prompt_masked():
    model, prompt, scale = make_model(), PROMPTS[0], 2.5
    with torch.no_grad():
        prompted = model(input_ids=torch.tensor([prompt + [MASK] * 6])).logits[0, -6:]
        unprompted = model(input_ids=torch.full((1, len(prompt) + 6), MASK)).logits[0, -6:]
    guided, unguided = (1 + scale) * prompted - scale * unprompted, prompted.clone()
    for logits in (guided, unguided):
        logits[:, MASK] = -math.inf
    ends = {"eos_token_id": [], "max_new_tokens": 6, "steps": 1}
    assert generate(model, [prompt], cfg_scale=scale, **ends) == [guided.argmax(-1).tolist()]
    assert generate(model, [prompt], cfg_scale=0.0, **ends) == [unguided.argmax(-1).tolist()]
    assert guided.argmax(-1).tolist() != unguided.argmax(-1).tolist()


def test_rows_stop_when_their_text_is_decided():
    """Equal text is held by the naive sampler above; here, that no row is computed longer than it takes."""
    model, arguments, ends = make_model(), {"max_new_tokens": 12, "block_length": 3}, (0, 5, 9, 14, 21)
    rows = []
    model.get_input_embeddings().register_forward_hook(lambda _, args, output: rows.append(len(args[0])))
    generate(model, PROMPTS, **arguments, eos_token_id=list(ends))
    computed = list(rows)
    decided = [naive_response(model, prompt, **arguments, ends=ends)[1] for prompt in PROMPTS]
    assert computed == [sum(d > step for d in decided) for step in range(max(decided))]
    assert min(decided) < 12  # or else nothing stopped


def test_the_mask_token_is_never_predicted():
    plain, tempted = make_model(), make_model()
    to_mask = torch.nn.functional.one_hot(torch.tensor(MASK), 30) * 1e4
    tempted.get_output_embeddings().register_forward_hook(lambda _, args, logits: logits + to_mask)
    for sampling in SAMPLING.values():
        arguments = {"max_new_tokens": 6, "steps": 3, "seed": 0, **sampling}
        assert generate(tempted, PROMPTS, **arguments) == generate(plain, PROMPTS, **arguments)


# ---------------------------------------------------------------------------------------------------------------- noise


def assert_frequencies(samples, probabilities):
    """Each outcome's frequency within five standard errors of its probability."""
    for outcome, p in probabilities.items():
        standard_error = math.sqrt(p * (1 - p) / len(samples))
        frequency = sum(sample == outcome for sample in samples) / len(samples)
        assert abs(frequency - p) < 5 * standard_error + 1e-12, outcome
    assert sum(probabilities.values()) == pytest.approx(1)


@pytest.mark.parametrize("cfg_scale", [0.0, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_one_token_is_sampled_from_the_tempered_softmax(temperature, cfg_scale):
    model, prompt = make_model(vocab_size=8, eos_token_id=None), [5, 3, 7]
    logits = naive_logits(model, [*prompt, MASK], len(prompt), cfg_scale)[-1]
    arguments = {"max_new_tokens": 1, "temperature": temperature, "cfg_scale": cfg_scale, "seed": 1}
    samples = generate(model, [prompt], num_return_sequences=3000, **arguments)
    assert_frequencies([s[0] for s in samples], dict(enumerate((logits.double() / temperature).softmax(-1).tolist())))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("remasking", ["random", "low_confidence"])
def test_two_tokens_are_sampled_from_their_joint_distribution(remasking, temperature):
    """
    Both are drawn, one is kept, the other drawn again given the first: kept is either of them with probability 1/2, or
    the one that the model (at temperature 1, whatever it is drawn at) gives the higher probability.
    """
    # With this seed the temperature changes which of two draws is the more probable, in a twelfth of the cases
    model, prompt = make_model(seed=10, vocab_size=6, eos_token_id=None, pad_token_id=None), [5, 3]
    tokens = [token for token in range(6) if token != MASK]

    def distributions(*response):
        logits = naive_logits(model, [*prompt, *response], len(prompt), 0.0)[-2:].double()
        return (logits / temperature).softmax(-1), logits.softmax(-1)

    drawn, confidence = distributions(MASK, MASK)
    kept = {0: dict.fromkeys(tokens, 0.0), 1: dict.fromkeys(tokens, 0.0)}  # probability that a place keeps a token
    for a, b in itertools.product(tokens, tokens):
        left = 0.5 if remasking == "random" else float(confidence[0, a] > confidence[1, b])
        kept[0][a] += float(drawn[0, a] * drawn[1, b]) * left
        kept[1][b] += float(drawn[0, a] * drawn[1, b]) * (1 - left)
    joint = {
        (a, b): kept[0][a] * float(distributions(a, MASK)[0][1, b])
        + kept[1][b] * float(distributions(MASK, b)[0][0, a])
        for a, b in itertools.product(tokens, tokens)
    }
    arguments = {"max_new_tokens": 2, "temperature": temperature, "remasking": remasking, "seed": 2}
    samples = generate(model, [prompt], num_return_sequences=3000, **arguments)
    assert_frequencies([tuple(s) for s in samples], joint)


def test_repeated_prompts_are_num_return_sequences():
    model, arguments = make_model(), {"max_new_tokens": 6, "temperature": 1.0, "seed": 5}
    three_each = generate(model, PROMPTS[:2], num_return_sequences=3, **arguments)
    assert three_each == generate(model, [p for p in PROMPTS[:2] for _ in range(3)], **arguments)
    assert three_each[::3] == generate(model, PROMPTS[:2], **arguments)
    assert len({tuple(response) for response in three_each}) == 6


def test_the_seed_names_the_noise():
    model, arguments = make_model(), {"max_new_tokens": 6, "temperature": 1.0}
    by_seed = [generate(model, PROMPTS, seed=seed, **arguments) for seed in (0, 0, 1)]
    assert by_seed[0] == by_seed[1] != by_seed[2]
    unseeded = []
    for global_seed in (7, 7, 8):
        torch.manual_seed(global_seed)
        unseeded.append(generate(model, PROMPTS, **arguments))
    assert unseeded[0] == unseeded[1] != unseeded[2]
    assert generate(model, PROMPTS, **arguments) != generate(model, PROMPTS, **arguments)


class Drawn(TorchDispatchMode):
    """How many random numbers are drawn inside the block, by call."""

    def __init__(self):
        super().__init__()
        self.numbers = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.rand:
            self.numbers.append(result.numel())
        return result


@pytest.mark.parametrize("tile", [1, 3, 100])
def test_noise_is_drawn_where_something_is_masked(monkeypatch, tile):
    """Of two prompts and blocks of four, one revealed a step: a row draws for 4, 3, 2 and 1 positions."""
    monkeypatch.setattr(sampler, "LOGITS_TILE", tile * 30)
    arguments = {"max_new_tokens": 8, "block_length": 4, "temperature": 1.0, "seed": 0, "eos_token_id": []}
    with Drawn() as drawn:
        sampled = generate(make_model(), PROMPTS[:2], **arguments)
    assert sum(drawn.numbers) == 2 * 2 * (4 + 3 + 2 + 1) * 30
    assert max(drawn.numbers) == min(tile, 4) * 30
    assert sampled == one_by_one(make_model(), PROMPTS[:2], **arguments)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 0}, {"cfg_scale": 1.0, "temperature": 1.0}])
def test_there_is_one_copy_of_a_blocks_logits(monkeypatch, sampling):
    """And, with guidance, one of the unconditional ones; of a tile there are a few, in double precision too."""
    vocab, rows, new = 5000, 4, 64
    monkeypatch.setattr(sampler, "LOGITS_TILE", 2 * vocab)
    model, ids = make_model(vocab_size=vocab), torch.tensor([[5, 9, 10]] * rows)
    with LiveBytes() as memory:
        model.generate(ids, max_new_tokens=new, steps=2, **sampling)
    copy_of_all, tile = 4 * rows * new * vocab, 4 * 2 * vocab
    layers = 4 * rows * (3 + new) * 64 * 8  # what one block of the model holds at once, and generously
    assert memory.largest == copy_of_all
    assert memory.peak < (2 if "cfg_scale" in sampling else 1) * copy_of_all + 8 * tile + layers


@pytest.mark.parametrize("sampling", [{}, {"temperature": 2.0, "seed": 0}])
def test_what_is_no_token_is_never_predicted(sampling):
    """The output head may have more rows than the vocabulary has tokens."""
    model = make_model(vocab_size=20, embedding_size=64)
    with torch.no_grad():
        model.get_output_embeddings().weight[20:] *= 5
    prompts = [[5, 11, 3], [7, 9]]
    out = generate(model, prompts, max_new_tokens=8, num_return_sequences=8, eos_token_id=[], **sampling)
    assert max(map(max, out)) < 20
    assert model(torch.tensor(prompts[:1])).logits.argmax(-1).max() >= 20  # or else nothing was tempting


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 0}, {"remasking": "random", "seed": 0}])
def test_the_global_generator_is_left_alone_if_not_needed(sampling):
    model = make_model()
    before = torch.random.get_rng_state()
    generate(model, PROMPTS, max_new_tokens=4, **sampling)
    assert torch.equal(torch.random.get_rng_state(), before)


# ---------------------------------------------------------------------------------------- transformers' way of calling


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"max_new_tokens": 6, "generation_config": GenerationConfig(steps=3)}, {"max_new_tokens": 6, "steps": 3}),
        (
            {"generation_config": GenerationConfig(max_new_tokens=8, block_length=4, remasking="random", seed=1)},
            {"max_new_tokens": 8, "block_length": 4, "remasking": "random", "seed": 1},
        ),
        (
            {"generation_config": GenerationConfig(max_new_tokens=8, eos_token_id=[5, 9], pad_token_id=1), "steps": 4},
            {"max_new_tokens": 8, "steps": 4, "eos_token_id": [5, 9], "pad_token_id": 1},
        ),
        ({"generation_config": GenerationConfig(max_new_tokens=8), "max_new_tokens": 4}, {"max_new_tokens": 4}),
        ({"max_length": 7 + 5}, {"max_new_tokens": 5}),
        ({"generation_config": GenerationConfig(max_length=7 + 5)}, {"max_new_tokens": 5}),
        ({"generation_config": GenerationConfig(max_new_tokens=3), "max_length": 7 + 5}, {"max_new_tokens": 3}),
        ({"max_new_tokens": 6, "steps": 6, "block_length": 6}, {"max_new_tokens": 6}),
        ({"max_new_tokens": 6, "do_sample": True, "temperature": 0.7}, {"max_new_tokens": 6, "temperature": 0.7}),
        ({"max_new_tokens": 6, "do_sample": True}, {"max_new_tokens": 6, "temperature": 1.0}),
        ({"max_new_tokens": 6, "do_sample": False, "temperature": 0.7}, {"max_new_tokens": 6}),
        ({"max_new_tokens": 6, "cfg_scale": 0, "temperature": 0}, {"max_new_tokens": 6}),
        ({"max_new_tokens": 6, "eos_token_id": 5}, {"max_new_tokens": 6, "eos_token_id": [5]}),
        ({"max_new_tokens": 6, "eos_token_id": torch.tensor([5, 9])}, {"max_new_tokens": 6, "eos_token_id": [5, 9]}),
        (
            {
                "max_new_tokens": 6,
                "num_beams": 1,
                "top_k": 0,
                "top_p": 1.0,
                "repetition_penalty": 1.0,
                "use_cache": True,
            },
            {"max_new_tokens": 6},
        ),
        ({}, {"max_new_tokens": 128}),
    ],
)
def test_two_ways_to_say_the_same(one, other):
    model = make_model(n_layers=1)
    responses = [generate(model, PROMPTS, **{"seed": 1, **arguments}) for arguments in (one, other)]
    assert responses[0] == responses[1]


def test_the_models_own_generation_config_is_the_default():
    model, plain = make_model(), make_model()
    model.generation_config.max_new_tokens = 6
    model.generation_config.eos_token_id = [0, 5, 9]
    assert generate(model, PROMPTS) == generate(plain, PROMPTS, max_new_tokens=6, eos_token_id=[0, 5, 9])
    assert generate(model, PROMPTS, max_new_tokens=4, eos_token_id=0) == generate(plain, PROMPTS, max_new_tokens=4)


def test_a_saved_generation_config_comes_back(tmp_path):
    model = make_model()
    model.generation_config.update(max_new_tokens=6, steps=3, eos_token_id=[0, 5])
    model.save_pretrained(tmp_path)
    assert generate(type(model).from_pretrained(tmp_path), PROMPTS) == generate(model, PROMPTS)


def test_input_ids_inputs_and_return_dict():
    model, ids = make_model(), torch.tensor(PROMPTS[:2])
    expected = model.generate(ids, max_new_tokens=4)
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=4), expected)
    assert torch.equal(model.generate(inputs=ids, max_new_tokens=4), expected)
    assert torch.equal(model.generate(ids, max_new_tokens=4, return_dict_in_generate=True).sequences, expected)


def test_the_call_that_trl_makes():
    model, tokenizer = make_model(), make_tokenizer()
    texts = ["what is two plus two", "say hi"]
    inputs = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
    sequences = model.generate(**inputs, generation_config=GenerationConfig(max_new_tokens=4))
    prompts = [tokenizer(text).input_ids for text in texts]
    assert sequences[:, inputs["input_ids"].shape[1] :].tolist() == [
        naive_response(model, prompt, max_new_tokens=4)[0] for prompt in prompts
    ]


def make_adapted(dropout=0.0):
    config = LoraConfig(r=2, target_modules=LLADA.lora_target_modules, lora_dropout=dropout)
    adapted = get_peft_model(make_model(), config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=generator)
    return adapted


def test_an_adapted_model_generates_with_its_adapter():
    adapted = make_adapted().eval()
    expected = [naive_response(adapted, prompt, max_new_tokens=6)[0] for prompt in PROMPTS]
    assert generate(adapted, PROMPTS, max_new_tokens=6) == expected
    assert generate(make_model(), PROMPTS, max_new_tokens=6) != expected


def test_dropout_is_off_and_training_goes_on():
    model = make_adapted(dropout=0.5)
    expected = generate(model.eval(), PROMPTS, max_new_tokens=6)
    modes = [module.training for module in model.train().modules()]
    assert generate(model, PROMPTS, max_new_tokens=6) == expected
    assert [module.training for module in model.modules()] == modes
    assert all(modes)
    with pytest.raises(IndexError):
        model.generate(torch.tensor([[10**6]]), max_new_tokens=2)
    assert [module.training for module in model.modules()] == modes


def test_gradients_are_not_recorded():
    assert not make_model().generate(torch.tensor(PROMPTS[:1]), max_new_tokens=2).requires_grad
    assert torch.is_grad_enabled()


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_beams", 2),
        ("top_k", 5),
        ("top_k", 50),  # transformers' default when it samples, and not neutral
        ("top_p", 0.9),
        ("min_p", 0.1),
        ("typical_p", 0.9),
        ("repetition_penalty", 1.2),
        ("no_repeat_ngram_size", 2),
        ("min_new_tokens", 2),
        ("max_time", 1.0),
        ("stop_strings", ["."]),
        ("output_scores", True),
        ("output_hidden_states", True),
        ("bad_words_ids", [[3]]),
        ("guidance_scale", 2.0),
        ("blocklength", 4),
    ],
)
@pytest.mark.parametrize("route", ["kwarg", "generation_config"])
def test_what_the_sampler_does_not_have_is_refused_by_name(route, name, value):
    given = {name: value} if route == "kwarg" else {"generation_config": GenerationConfig(**{name: value})}
    with pytest.raises(ValueError, match=rf"`{name}="):
        make_model().generate(torch.tensor(PROMPTS[:1]), max_new_tokens=4, **given)


@pytest.mark.parametrize("name", ["logits_processor", "stopping_criteria", "streamer", "assistant_model"])
def test_objects_of_autoregressive_decoding_are_refused_by_name(name):
    with pytest.raises(ValueError, match=rf"`{name}="):
        make_model().generate(torch.tensor(PROMPTS[:1]), max_new_tokens=4, **{name: [object()]})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 0}, "`max_new_tokens`"),
        ({"max_new_tokens": -3}, "`max_new_tokens`"),
        ({"max_length": 7}, "`max_length=7` counts the prompt too, which has 7 tokens.*`max_new_tokens`"),
        ({"seed": 2**63, "temperature": 1.0}, "`seed`.*64 bits"),
        ({"block_length": 3}, "`block_length`"),
        ({"block_length": 0}, "`block_length`"),
        ({"block_length": -2}, "`block_length`"),
        ({"block_length": 16}, "`block_length`"),
        ({"steps": 0}, "`steps`"),
        ({"steps": -8}, "`steps`"),
        ({"steps": 9}, "`steps`"),
        ({"block_length": 2, "steps": 2}, "`steps`"),
        ({"block_length": 2, "steps": 6}, "`steps`"),
        ({"remasking": "greedy"}, "`remasking`"),
        ({"temperature": -1.0}, "`temperature`"),
        ({"temperature": math.nan}, "`temperature`.*finite.*nan"),
        ({"temperature": math.inf}, "`temperature`.*finite.*inf"),
        ({"cfg_scale": -0.5}, "`cfg_scale`"),
        ({"cfg_scale": math.nan}, "`cfg_scale`.*finite.*nan"),
        ({"max_new_tokens": 8.0}, "`max_new_tokens`.*whole number.*8.0"),
        ({"steps": "4"}, "`steps`.*whole number.*'4'"),
        ({"temperature": "hot"}, "`temperature`.*number.*'hot'"),
        ({"num_return_sequences": 0}, "`num_return_sequences`"),
    ],
)
def test_values_that_do_not_fit_are_refused_by_name(arguments, message):
    defaults = {} if "max_length" in arguments else {"max_new_tokens": 8}
    with pytest.raises(ValueError, match=message):
        make_model().generate(torch.tensor(PROMPTS[:1]), **{**defaults, **arguments})


def test_prompts_that_cannot_be_continued_are_refused():
    model, ids = make_model(), torch.tensor([[5, 6, 7], [8, 0, 0]])
    with pytest.raises(ValueError, match="padded on the left"):
        model.generate(ids, attention_mask=torch.tensor([[1, 1, 1], [1, 0, 0]]), max_new_tokens=2)
    with pytest.raises(ValueError, match="mask token"):
        model.generate(torch.tensor([[5, MASK, 7]]), max_new_tokens=2)
    for prompts, got in [
        (None, ""),
        ([[5, 6]], r"got \[\[5, 6\]\]"),
        (ids[0], r"of shape \(3,\)"),
        (ids.float(), "torch.float32"),
    ]:
        with pytest.raises(ValueError, match=f"`input_ids`.*{got}"):
            model.generate(prompts, max_new_tokens=2)
    for mask in (ids[:1], ids[:, :2], [[1, 1, 1]] * 2):
        with pytest.raises(ValueError, match=r"`attention_mask` must have the shape of `input_ids`, \(2, 3\)"):
            model.generate(ids, attention_mask=mask, max_new_tokens=2)
    model.config.mask_token_id = None
    with pytest.raises(ValueError, match="`mask_token_id`"):
        model.generate(ids[:1], max_new_tokens=2)
    assert model.generate(ids[:1], max_new_tokens=2, mask_token_id=MASK).shape == (1, 5)


def test_a_prompt_may_be_empty():
    model = make_model()
    nothing = torch.zeros(1, 0, dtype=torch.long)
    assert model.generate(nothing, max_new_tokens=4)[0].tolist() == naive_response(model, [], max_new_tokens=4)[0]


def test_a_mask_token_in_the_padding_is_no_gap():
    model = make_model()
    padded = model.generate(
        torch.tensor([[MASK, 5, 6]]), attention_mask=torch.tensor([[0, 1, 1]]), max_new_tokens=4, cfg_scale=1.0
    )
    assert padded[0, 3:].tolist() == naive_response(model, [5, 6], max_new_tokens=4, cfg_scale=1.0)[0]
