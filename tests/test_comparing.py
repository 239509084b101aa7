"""Settings of the sampler, compared: counts against numbers by hand, shares against the answers."""

import pytest
from conftest import make_model, make_tokenizer

from trl_diffusion import compare_sampling

PROMPTS = ["what is one", "say hi", "what is two", "say hi"]
SETTINGS = {
    "exact": {},
    "pairs": {"steps": 3},
    "dual": {"block_length": 3, "block_cache": "dual"},
    "guided": {"cfg_scale": 1.0},
}


def test_counts_and_shares():
    model = make_model()
    model.get_output_embeddings().weight.data[[0, 5]] = 0  # rarely an end: as many steps as there are
    found = compare_sampling(model, make_tokenizer(), PROMPTS, SETTINGS, max_new_tokens=6, eos_token_id=[1000])
    # Prompts of 3 and 2 tokens; a batch of each length, and "say hi" anew in a third. Each tries its cache on one row
    whole, tried = 6 + 2.5, 3 * 3 + (9 + 8 + 8)
    assert found.forwards == {"exact": 6, "pairs": 3, "dual": 6 + 2 * 3 / 4, "guided": 12}
    assert found.tokens_run["exact"] == 6 * whole and found.tokens_run["guided"] == 12 * whole
    assert found.tokens_run["dual"] == 2 * (whole + 2 * 3) + tried / 4
    for name in SETTINGS:
        pairs = list(zip(found.answers[name], found.answers["exact"], strict=True))
        assert found.same_answers[name] == sum(a == b for a, b in pairs) / 4
        assert found.same_answers[name] <= found.same_tokens[name] <= 1
    assert found.same_tokens["exact"] == 1 > found.same_tokens["pairs"]
    assert f"| exact | 6.0 | {6 * whole:.0f} | 100.0% | 100.0% |" in str(found)
    assert not model.get_input_embeddings()._forward_pre_hooks


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="`settings` is empty"):
        compare_sampling(make_model(), make_tokenizer(), PROMPTS, {})
    with pytest.raises(ValueError, match="`blocklength=4` has no meaning"):
        compare_sampling(make_model(), make_tokenizer(), PROMPTS, {"a": {}, "b": {"blocklength": 4}})
