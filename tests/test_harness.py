"""Our model in lm-evaluation-harness: it answers what `likelihood` and `generate` give; tasks; what is refused."""

import json
import logging
import sys
from itertools import takewhile
from pathlib import Path
from types import SimpleNamespace

import lm_eval
import pytest
import torch
import yaml
from conftest import HUB_TEMPLATE, WORDS, make_model, make_tokenizer
from datasets import Dataset
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager
from peft import LoraConfig, get_peft_model
from processes import run_forked
from test_blocks import family, known
from test_families import make_llama

from trl_diffusion import likelihood
from trl_diffusion.cli import harness as command
from trl_diffusion.cli.main import main
from trl_diffusion.evaluation.greedy import is_greedy
from trl_diffusion.models.sampler import generate

PAIRS = [("what is one", " plus"), ("say", " hi two"), ("", "red green"), ("what is ", "one plus two three")]
"""Contexts and continuations: with the space on either side, and without a context."""


def harness_model(model=None, **options):
    return get_model("trl_diffusion")(model or make_model(), tokenizer=make_tokenizer(), **options)


def requests(*arguments):
    return [SimpleNamespace(args=each) for each in arguments]


@pytest.fixture
def said(caplog, monkeypatch):
    """What is logged where the harness shows it, which keeps it from others."""
    logger = logging.getLogger("lm_eval.trl_diffusion")
    monkeypatch.setattr(logger, "propagate", False)
    logger.addHandler(caplog.handler)
    logger.setLevel(logging.INFO)
    yield lambda: [record.getMessage() for record in caplog.records]
    logger.removeHandler(caplog.handler)


# Log-likelihoods


@pytest.mark.parametrize(
    "options",
    [
        {"num_mc_samples": 8},
        {"method": "chain_rule"},
        {"mask_scheme": "fixed_count"},
        {"cfg_scale": 0.5, "num_mc_samples": 4},
    ],
)
def test_log_likelihoods_are_those_of_likelihood(options, said):
    lm = harness_model(seed=3, **options)
    pairs = [pair for pair in PAIRS if pair[0] or "cfg_scale" not in options]  # which needs a prompt to guide by
    found = lm.loglikelihood(requests(*pairs), disable_tqdm=True)
    rows = Dataset.from_dict({"prompt": [a for a, _ in pairs], "completion": [b for _, b in pairs]})
    expected = likelihood(make_model(), make_tokenizer(), rows, seed=3, **options)
    assert [nats for nats, _ in found] == [row["nats"] for row in expected.rows]
    errors = [row["standard_error"] for row in expected.rows]
    mean, info = sum(errors) / len(errors), lm.get_model_info()
    assert info["standard_error_nats_max"] == max(errors) and info["likelihood"] == options
    assert info["standard_error_nats_mean"] == pytest.approx(mean)
    assert said()[0].startswith(f"{len(pairs)} log-likelihoods, standard error {mean:.3g} nats, at most")


def test_rolling_log_likelihoods_are_sums_over_windows(said):
    texts = ["one two three four five", "say hi"]
    lm = harness_model(num_mc_samples=8, max_length=3)
    found = lm.loglikelihood_rolling(requests(*((text,) for text in texts)), disable_tqdm=True)
    rows = likelihood(make_model(), make_tokenizer(), texts, num_mc_samples=8, max_length=3).rows
    assert found == [rows[0]["nats"] + rows[1]["nats"], rows[2]["nats"]]
    assert "2 texts were cut into 3 windows, scored apart." in said()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["full", "blocks"])
def test_greedy_is_what_the_sampler_writes(kind, monkeypatch):
    """With the continuation that it writes, and with each token of it changed."""
    known(monkeypatch, *([family(4)] if kind == "blocks" else []))
    model = make_model() if kind == "full" else make_llama().eval()
    prompt = torch.tensor([[9, 10, 11]])
    one_a_step = {} if kind == "full" else {"confidence_threshold": 1}
    written = generate(model, prompt, max_new_tokens=6, eos_token_id=None, **one_a_step)
    assert is_greedy(model, written, 3, 2)
    for place in range(3, 9):
        other = written.clone()
        other[0, place] = 12 if written[0, place] != 12 else 13
        assert not is_greedy(model, other, 3, 2)


def test_the_flag_of_the_harness_is_greedy():
    answers = {prompt: expected_answer(prompt, max_new_tokens=3) for prompt in PROMPTS}
    prompt, answer = next(each for each in answers.items() if len(each[1].split()) == 3)  # no end within it
    lm = harness_model(num_mc_samples=2)
    found = lm.loglikelihood(requests((prompt, f" {answer}"), (prompt, " bye bye bye")), disable_tqdm=True)
    assert [greedy for _, greedy in found] == [True, False]


# Answers


def expected_answer(prompt, **arguments):
    tokenizer = make_tokenizer()
    inputs = tokenizer(prompt, return_tensors="pt")
    answer = make_model().generate(**inputs, **arguments)[0, inputs["input_ids"].shape[1] :].tolist()
    ends = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|eot_id|>"])
    return tokenizer.decode([*takewhile(lambda token: token not in ends, answer)], skip_special_tokens=True)


PROMPTS = ["what is one plus two", "say", "red green blue", "is"]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_answers_are_those_of_the_sampler_whatever_the_batch(batch_size):
    """A task's own words for the canvas, and for what is greedy; what the user set takes precedence."""
    asked = {"until": [], "max_gen_toks": 8, "do_sample": False, "temperature": 0.7, "top_p": 0.9}
    lm = harness_model(batch_size=batch_size)
    found = lm.generate_until(requests(*((prompt, asked) for prompt in PROMPTS)), disable_tqdm=True)
    assert [text.strip() for text in found] == [expected_answer(prompt, max_new_tokens=8) for prompt in PROMPTS]
    lm = harness_model(batch_size=batch_size, max_new_tokens=4, block_length=2, temperature=1.0, seed=5)
    found = lm.generate_until(requests(*((prompt, asked) for prompt in PROMPTS)), disable_tqdm=True)
    arguments = {"max_new_tokens": 4, "block_length": 2, "temperature": 1.0, "seed": 5}
    assert [text.strip() for text in found] == [expected_answer(prompt, **arguments) for prompt in PROMPTS]


def test_an_answer_stops_before_the_first_stop_string(said):
    lm = harness_model()
    whole = lm.generate_until(requests(("say one two", {"until": [], "max_gen_toks": 8})), disable_tqdm=True)[0]
    words = whole.split()
    assert len({words[0], words[-1]}) == 2
    assert "1 of 1 answers fill their canvas and have neither an end of text nor a stop string." in said()
    for stops in (words[-1], [words[-1]], ["no such", words[-1], ""], ["no such", f" {words[-1]}"]):
        found = lm.generate_until(requests(("say one two", {"until": stops, "max_gen_toks": 8})), disable_tqdm=True)[0]
        assert found.strip() == whole[: whole.index(words[-1])].strip() != whole.strip()
    assert sum("neither an end" in message for message in said()) == 1


def test_a_stop_string_that_is_a_special_token_is_not_lost_in_decoding(monkeypatch):
    lm = harness_model()
    ids = make_tokenizer()("one two <|start_header_id|> three")["input_ids"]
    monkeypatch.setattr("trl_diffusion.evaluation.answers.Answerer.__call__", lambda answerer, batch: [[ids]])
    found = [
        lm.generate_until(requests(("say", {"until": stops, "max_gen_toks": 8})), disable_tqdm=True)[0].strip()
        for stops in ([], ["<|start_header_id|>"])
    ]
    assert found == ["one two three", "one two"]


def test_conversations_are_written_by_the_chat_template():
    lm = harness_model()
    turns = [{"role": "user", "content": "say hi"}]
    assert lm.apply_chat_template(turns) == lm.tokenizer.apply_chat_template(turns, tokenize=False)
    begun = lm.apply_chat_template([*turns, {"role": "assistant", "content": "hi you"}], add_generation_prompt=False)
    assert begun.endswith("hi you") and lm.chat_template(True) == HUB_TEMPLATE and lm.chat_template(False) is None
    lm.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="The tokenizer has no chat template: leave `--apply_chat_template` out"):
        lm.apply_chat_template(turns)


# Tasks

TASK = {
    "dataset_path": "json",
    "test_split": "test",
    "doc_to_text": "{{question}}",
}
CHOICES = TASK | {
    "task": "choices",
    "output_type": "multiple_choice",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc"}],
}
WRITING = TASK | {
    "task": "writing",
    "output_type": "generate_until",
    "doc_to_target": "{{choices[answer]}}",
    "generation_kwargs": {"until": ["bye"], "max_gen_toks": 4},
    "metric_list": [{"metric": "exact_match"}],
}
ROWS = [
    {"question": f"what is {a} plus {b}", "choices": [a, b, f"{b} {a}"], "answer": number % 3}
    for number, (a, b) in enumerate(zip(WORDS[:6], WORDS[4:10], strict=True))
]


def write_tasks(folder, rows=ROWS, tasks=(CHOICES, WRITING)):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for task in tasks:
        task = task | {"dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}}}
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))
    return TaskManager(include_path=str(folder), include_defaults=False)


def evaluate(lm, manager, names, **options):
    return lm_eval.evaluate(lm, manager.load(names), bootstrap_iters=0, **options)


@pytest.fixture
def datasets_stay(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def test_a_task_of_our_own(tmp_path, datasets_stay):
    """Accuracies from what `likelihood` and `generate` say, counted by hand."""
    found = evaluate(harness_model(num_mc_samples=8), write_tasks(tmp_path), ["choices", "writing"])
    right = []
    for row in ROWS:
        options = Dataset.from_list([{"prompt": row["question"], "completion": f" {c}"} for c in row["choices"]])
        scores = [each["nats"] for each in likelihood(make_model(), make_tokenizer(), options, num_mc_samples=8).rows]
        right.append(scores.index(max(scores)) == row["answer"])
    assert found["results"]["choices"]["acc,none"] == sum(right) / len(ROWS)
    assert 0 < sum(right) < len(ROWS)  # so that a constant would not do
    written = [expected_answer(row["question"], max_new_tokens=4).split("bye")[0].strip() for row in ROWS]
    samples = sorted(found["samples"]["writing"], key=lambda sample: sample["doc_id"])
    assert [sample["resps"][0][0].strip() for sample in samples] == written


def shares(folder):
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    lm = harness_model(num_mc_samples=4)
    found = evaluate(lm, manager, ["choices", "writing"])
    if lm.rank == 0:
        samples = [
            [s["doc_id"], s["resps"]] for name in found["samples"] for s in sorted(found["samples"][name], key=str)
        ]
        (folder / f"of{lm.world_size}.json").write_text(json.dumps([found["results"]["choices"]["acc,none"], samples]))
    lm.barrier()


def test_two_processes_share_a_task(tmp_path, datasets_stay):
    write_tasks(tmp_path)
    shares(tmp_path)
    assert run_forked(shares, tmp_path, processes=2, folder=tmp_path) == [0, 0], (tmp_path / "rank0.log").read_text()
    alone, together = (json.loads((tmp_path / f"of{number}.json").read_text()) for number in (1, 2))
    assert alone == together


def test_real_questions_that_come_with_the_harness(tmp_path, datasets_stay):
    """Those of MMLU's prompts with their written answers: all are read, and some are answered."""
    folder = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "flan_cot_fewshot"
    prompts = json.loads((folder / "_cot_prompts.json").read_text(encoding="utf-8"))
    questions = [part for prompt in prompts.values() for part in prompt.split("\n\nQ: ")[1:]]
    rows = [dict(zip(("question", "answer"), part.split("\nA: "), strict=True)) for part in questions]
    assert len(rows) == 282 and all("answer is" in row["answer"] for row in rows)
    task = WRITING | {"task": "mmlu_shipped", "doc_to_text": "Q: {{question}}\nA:", "doc_to_target": "{{answer}}"}
    manager = write_tasks(tmp_path, rows, [task])
    found = evaluate(harness_model(max_new_tokens=4), manager, ["mmlu_shipped"], limit=3)
    assert found["n-samples"]["mmlu_shipped"] == {"original": 282, "effective": 3}
    assert [s["arguments"][0][0] for s in found["samples"]["mmlu_shipped"]] == [
        f"Q: {row['question']}\nA:" for row in rows[:3]
    ]


# Loading


def test_a_model_by_its_path_with_an_adapter_and_in_4_bits(tmp_path):
    sizes = {"d_model": 64, "mlp_hidden_size": 128}  # whole blocks of 4-bit weights
    make_model(**sizes).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    base = make_model(**sizes)
    base.config._name_or_path = str(tmp_path / "base")  # where PEFT looks for the size of the vocabulary
    adapted = get_peft_model(base, LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path / "adapter")
    arguments = f"pretrained={tmp_path / 'base'},num_mc_samples=4"
    kind, asked = get_model("trl_diffusion"), requests(*PAIRS)
    for more, model in (("", make_model(**sizes)), (f",peft={tmp_path / 'adapter'}", adapted)):
        lm = kind.create_from_arg_string(arguments + more, {"device": "cuda:0"})  # as the harness says by default
        expected = harness_model(model, num_mc_samples=4).loglikelihood(asked, disable_tqdm=True)
        assert lm.loglikelihood(asked, disable_tqdm=True) == expected and lm.device.type == "cpu"
    lm = kind.create_from_arg_string(f"{arguments},load_in_4bit=True")
    assert lm.model.is_loaded_in_4bit and lm.model.dtype == torch.bfloat16
    assert all(nats < 0 for nats, _ in lm.loglikelihood(asked, disable_tqdm=True))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("pretrained=x,num_mc_sample=8", "`num_mc_sample=8` in `--model_args` is not an .* `num_mc_samples`"),
        ("pretrained=x,gen_length=8", "`gen_length=8` in `--model_args` is not an argument of `trl_diffusion`"),
        ("pretrained=x,batch_size=auto", "`--batch_size auto` must be a number of prompts"),
        ("pretrained=x,batch_size=0", "`--batch_size 0` must be a number of prompts"),
        ("pretrained=no-such-folder", "`model='no-such-folder'` could not be loaded"),
    ],
)
def test_arguments_that_have_no_meaning(arguments, message):
    with pytest.raises((ValueError, OSError), match=message):
        get_model("trl_diffusion").create_from_arg_string(arguments)


def test_a_loaded_model_has_its_tokenizer_and_is_not_loaded():
    with pytest.raises(ValueError, match="`tokenizer` goes with a `pretrained` that is loaded already"):
        get_model("trl_diffusion")(make_model())
    with pytest.raises(ValueError, match="`dtype` says how to load a model, and `pretrained` is loaded already"):
        harness_model(dtype="bfloat16")


@pytest.mark.parametrize(
    "asked, options, message",
    [
        ({"max_gen_toks": 8}, {}, "1 of 1 prompts .* do not fit. With `max_new_tokens=8` a prompt may have 0 tokens"),
        ({"max_gen_toks": 4}, {"steps": 3, "block_length": 2}, "`steps` must be a multiple of the number of blocks"),
        ({"max_gen_toks": 4, "do_sample": True, "top_p": 0.9}, {}, "`top_p=0.9` has no meaning for a diffusion"),
    ],
)
def test_what_a_sampler_cannot_do_is_said_before_it_begins(asked, options, message):
    lm = harness_model(make_model(max_sequence_length=8), **options)
    with pytest.raises(ValueError, match=message):
        lm.generate_until(requests(("say", asked)), disable_tqdm=True)


def test_an_empty_context_and_a_pair_that_is_too_long():
    lm = harness_model(make_model(max_sequence_length=8))
    with pytest.raises(ValueError, match="Context 0 of the task has no token"):
        lm.generate_until(requests(("", {"max_gen_toks": 4})), disable_tqdm=True)
    with pytest.raises(ValueError, match="Row 0 has 9 tokens, prompt and completion, and 8 fit"):
        lm.loglikelihood(requests(("one " * 8, "two")), disable_tqdm=True)


# The command


def test_the_command_is_the_harness_with_our_model(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: seen.append(sys.argv[1:]))
    before = sys.argv
    assert main(["lm-eval"]) == 0 and "trl-diffusion lm-eval --model_args" in capsys.readouterr().out
    for options in (["--tasks", "x"], ["run", "--tasks", "x"]):
        assert main(["lm-eval", *options]) == 0
    for options in (["ls", "tasks"], ["run", "--model", "hf"], ["run", "--config", "x.yaml"], ["run", "--model=hf"]):
        assert main(["lm-eval", *options]) == 0
        assert seen.pop() == options
    assert seen == [["run", "--model", "trl_diffusion", "--tasks", "x"]] * 2 and sys.argv is before


def test_an_unknown_task_is_answered_with_the_nearest(monkeypatch, capsys, tmp_path):
    manager = write_tasks(tmp_path)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda *args, **kwargs: manager)
    assert main(["lm-eval", "--model_args", "pretrained=x", "--tasks", "choises,writing"]) == 1
    assert (
        "Tasks not found: choises. Did you mean `choices`? `trl-diffusion lm-eval ls tasks`" in capsys.readouterr().err
    )


def test_without_the_harness_the_command_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    assert main(["lm-eval", "--tasks", "x"]) == 1
    assert "pip install 'trl_diffusion[eval]'" in capsys.readouterr().err
    assert command.INTRODUCTION.startswith("Runs benchmarks")
