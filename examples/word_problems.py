"""
Word problems answered by a careless student: a task that a tiny diffusion language model learns in a minute on a CPU.

    Ben has 14 coins . He borrows 5 . He sells 3 . How many now ?   ->   14 + 5 = 19 ; 19 - 3 = 16 ; so 16

The student can add and subtract, but mixes up "borrows" and "lends" most of the time. A model pre-trained on the
student's homework has the same habit: it knows both ways to read these two verbs, and prefers the wrong one. That is
what preference optimisation is for, and here every answer can be checked.

Everything is made from a seed; nothing is downloaded. Pre-training needs torch 2.9 or later (`torch.optim.Muon`).
"""

import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from signal import SIG_DFL, SIGINT, signal

import torch
from datasets import Dataset, concatenate_datasets
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast

from trl_diffusion.models import LLaDAConfig, LLaDAModelLM

NAMES = {"Ben": "He", "Tom": "He", "Max": "He", "Ann": "She", "Eva": "She", "Zoe": "She"}
NOUNS = ("coins", "books", "cards", "pens", "eggs", "cups")
SIGN = {"finds": 1, "buys": 1, "wins": 1, "sells": -1, "loses": -1, "drops": -1, "borrows": 1, "lends": -1}
PLAIN_VERBS = ("finds", "buys", "wins", "sells", "loses", "drops")
TRICKY_VERBS = ("borrows", "lends")
LARGEST_NUMBER = 20  # every number in a problem or an answer is one token between 0 and this
LARGEST_OPERAND = 3
ONE_STEP_SHARE = 0.2  # of the problems; the others have two steps
TRICKY_SHARE = 0.45  # of the steps: about half of the problems have at least one
CARELESS_SHARE = 0.6  # how often the student mixes up a tricky verb
MAX_NEW_TOKENS = 16  # canvas of an answer: the longest has 15 tokens with its end of text

PAD, EOS, MASK, UNKNOWN = "<pad>", "<eos>", "<mask>", "<unk>"


@dataclass(frozen=True)
class Problem:
    """A story: a start number, then one or two steps `(verb, operand)`."""

    name: str
    noun: str
    start: int
    steps: tuple[tuple[str, int], ...]

    @property
    def prompt(self) -> str:
        told = " ".join(f"{NAMES[self.name]} {verb} {operand} ." for verb, operand in self.steps)
        return f"{self.name} has {self.start} {self.noun} . {told} How many now ?"

    @property
    def content(self) -> tuple:
        """What makes a problem new: numbers and verbs. Names and nouns are wrapping."""
        return (self.start, *self.steps)

    @property
    def is_tricky(self) -> bool:
        return any(verb in TRICKY_VERBS for verb, _ in self.steps)

    def answer(self, signs: list[int] | None = None) -> str | None:
        """The worked answer, with a reading (+1 or -1) of each verb; None if it leaves the numbers there are."""
        signs = signs or [SIGN[verb] for verb, _ in self.steps]
        total, worked = self.start, []
        for (_, operand), sign in zip(self.steps, signs, strict=True):
            before, total = total, total + sign * operand
            if not 0 <= total <= LARGEST_NUMBER:
                return None
            worked.append(f"{before} {'+' if sign > 0 else '-'} {operand} = {total} ;")
        return f"{' '.join(worked)} so {total}"


def students_answer(problem: Problem, rng: random.Random) -> str:
    """What the careless student writes."""
    while True:
        mixed_up = [verb in TRICKY_VERBS and rng.random() < CARELESS_SHARE for verb, _ in problem.steps]
        signs = [-SIGN[verb] if wrong else SIGN[verb] for (verb, _), wrong in zip(problem.steps, mixed_up, strict=True)]
        answer = problem.answer(signs)
        if answer is not None:
            return answer


def draw_problem(rng: random.Random) -> Problem:
    """A problem all of whose readings stay among the numbers, so that the range does not tell the verbs apart."""
    while True:
        verbs = [
            rng.choice(TRICKY_VERBS if rng.random() < TRICKY_SHARE else PLAIN_VERBS)
            for _ in range(1 if rng.random() < ONE_STEP_SHARE else 2)
        ]
        steps = tuple((verb, rng.randint(1, LARGEST_OPERAND)) for verb in verbs)
        problem = Problem(rng.choice(list(NAMES)), rng.choice(NOUNS), rng.randint(1, LARGEST_NUMBER), steps)
        readings = [[1, -1] if verb in TRICKY_VERBS else [SIGN[verb]] for verb in verbs]
        signs = [[]]
        for options in readings:
            signs = [[*begun, sign] for begun in signs for sign in options]
        if all(problem.answer(reading) for reading in signs):
            return problem


def make_splits(seed: int, test=400, validation=200, pairs=600, pretraining=30_000) -> dict[str, list[Problem]]:
    """Problems for each use. No two uses share a `content`; inside the held-out ones no problem comes twice."""
    rng = random.Random(seed)
    splits, taken = {}, set()
    for name, size in {"test": test, "validation": validation, "pairs": pairs}.items():
        split = {}
        while len(split) < size:
            problem = draw_problem(rng)
            if problem.content not in taken:
                split.setdefault(problem.content, problem)
        taken |= split.keys()
        splits[name] = list(split.values())
    stream = (draw_problem(rng) for _ in range(2 * pretraining))
    splits["pretraining"] = [problem for problem in stream if problem.content not in taken][:pretraining]
    assert not taken & {problem.content for problem in splits["pretraining"]}
    assert len(taken) == test + validation + pairs
    return splits


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word."""
    words = [*NAMES, "He", "She", "has", *NOUNS, *SIGN, "How", "many", "now", "?", ".", "+", "-", "=", ";", "so"]
    return make_word_tokenizer([*words, *map(str, range(LARGEST_NUMBER + 1))], padding_side="left")


def make_word_tokenizer(words: list[str], **options) -> PreTrainedTokenizerFast:
    """One token for each of `words`, after the special ones."""
    vocabulary = [PAD, EOS, MASK, UNKNOWN, *dict.fromkeys(words)]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        mask_token=MASK,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
        **options,
    )


def make_model(
    tokenizer: PreTrainedTokenizerFast, d_model=128, n_layers=3, mlp_hidden_size=320, max_sequence_length=64
) -> LLaDAModelLM:
    """A LLaDA of half a million parameters."""
    config = LLaDAConfig(
        d_model=d_model,
        n_heads=4,
        n_layers=n_layers,
        mlp_hidden_size=mlp_hidden_size,
        vocab_size=len(tokenizer),
        max_sequence_length=max_sequence_length,
        rope_theta=10_000.0,
        init_std=0.05,
        mask_token_id=tokenizer.mask_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LLaDAModelLM(config)


# --- answering and marking -------------------------------------------------------------------------------------------


def answer(
    model, tokenizer, prompts: list[str], label="answering", batch_size=200, leave=False, quiet=False, **sampling
) -> list[str]:
    """The model's answers, greedy and one token at a time unless `sampling` says otherwise."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].split()))  # equal lengths together: less padding
    answers = [""] * len(prompts)
    for first in tqdm(range(0, len(order), batch_size), desc=label, leave=leave, disable=quiet):
        batch = order[first : first + batch_size]
        inputs = tokenizer([prompts[i] for i in batch], padding=True, return_tensors="pt", padding_side="left")
        sequences = model.generate(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask,
            max_new_tokens=MAX_NEW_TOKENS,
            **sampling,
        )
        texts = tokenizer.batch_decode(sequences[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        for i, text in zip(batch, texts, strict=True):
            answers[i] = text
    return answers


def is_right(problem: Problem, text: str) -> bool:
    """Every step right."""
    return text.split() == problem.answer().split()


def is_final_number_right(problem: Problem, text: str) -> bool:
    """The last word right, however it was reached."""
    return text.split()[-1:] == problem.answer().split()[-1:]


def share(outcomes) -> float:
    """Mean of booleans."""
    outcomes = list(outcomes)
    return sum(outcomes) / len(outcomes)


# --- marked answers and preference pairs -----------------------------------------------------------------------------


def sample_thumbs(
    model, tokenizer, problems: list[Problem], seed: int, samples=2, steps=MAX_NEW_TOKENS, quiet=False
) -> Dataset:
    """The model's own answers, each with a thumb up or down: whether it is right."""
    asked = [problem for problem in problems for _ in range(samples)]
    # Small blocks: the more of an answer is free to be filled first, the more "most confident first" favours the habit
    texts = answer(
        model, tokenizer, [problem.prompt for problem in asked], label="sampling answers", leave=True, quiet=quiet,
        temperature=1.0, block_length=4, steps=steps, seed=seed,
    )  # fmt: skip
    rows = zip(asked, texts, strict=True)
    return Dataset.from_list(  # TRL joins the strings, so the space between the words goes to the completion
        [{"prompt": p.prompt, "completion": f" {text}", "label": is_right(p, text)} for p, text in rows if text]
    )


def pair_up(thumbs: Dataset) -> Dataset:
    """
    Pairs in the model's own words: of its answers to a prompt, the first right one is chosen and the first wrong one
    rejected. Prompts whose answers are all right or all wrong give no pair.
    """
    first: dict[str, dict[bool, str]] = {}
    for row in thumbs:
        first.setdefault(row["prompt"], {}).setdefault(row["label"], row["completion"])
    return Dataset.from_list(
        [
            {"prompt": prompt, "chosen": texts[True], "rejected": texts[False]}
            for prompt, texts in first.items()
            if len(texts) == 2
        ]
    )


def sample_pairs(model, tokenizer, problems: list[Problem], seed: int, samples=4, **sampling) -> Dataset:
    """Preference pairs of the model's own answers, see [`pair_up`]."""
    return pair_up(sample_thumbs(model, tokenizer, problems, seed, samples, **sampling))


def in_two_processes(sample, model, tokenizer, problems: list[Problem], *arguments, **keywords) -> Dataset:
    """What `sample` makes of the two halves of the problems, on two cores."""
    half = (len(problems) + 1) // 2
    quietly = {"initializer": signal, "initargs": (SIGINT, SIG_DFL)}  # an interrupt ends them without a word
    with ProcessPoolExecutor(2, mp_context=get_context("fork"), **quietly) as pool:
        parts = [
            pool.submit(
                sample, model, tokenizer, problems[start : start + half], *arguments, quiet=start > 0, **keywords
            )
            for start in range(0, len(problems), half)
        ]
        return concatenate_datasets([part.result() for part in parts])


# --- pre-training ----------------------------------------------------------------------------------------------------


def pretrain(tokenizer, splits, seed: int, batch_size=64, steps=900, goal=0.9, least=0.8, most_rounds=3, **size):
    """
    Train a model on the student's homework until it can calculate, see [`train_to_calculate`]. `size` is what
    `make_model` takes.
    """
    torch.manual_seed(seed)
    model = make_model(tokenizer, **size)
    batches = _homework(tokenizer, splits["pretraining"], random.Random(seed), batch_size)
    plain = [problem for problem in splits["validation"] if not problem.is_tricky]
    return train_to_calculate(
        model, tokenizer, plain, lambda _: _loss(model, next(batches)), steps, goal, least, most_rounds
    )


def train_to_calculate(model, tokenizer, plain: list[Problem], loss_of, steps=900, goal=0.9, least=0.8, most_rounds=3):
    """
    Steps on `loss_of(step)` until `goal` is the accuracy on `plain` problems, which have no tricky verb. A model that
    is not there after `steps` gets another round, half as long and half as bold; one that is below `least` after
    `most_rounds` is refused.
    """
    boldness, score = 1.0, 0.0
    for _ in range(most_rounds):
        train(model, loss_of, steps, boldness)
        texts = answer(model, tokenizer, [problem.prompt for problem in plain], label="checking")
        score = share(map(is_right, plain, texts))
        if score >= goal:
            break
        steps, boldness = steps // 2, boldness / 2
    if score < min(goal, least):
        raise RuntimeError(f"The model answers only {score:.0%} of the plain problems: its errors are not habits.")
    return model.eval()


def train(model, loss_of, steps: int, boldness=1.0, decay=0.0, label="pre-training") -> None:
    """
    Steps on `loss_of(step)`, the loss of a new batch, with learning rates that rise for 50 steps and then fall to zero.
    """
    optimizers = _optimizers(model, decay)
    peaks = [boldness * optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    with tqdm(range(steps), desc=label) as bar:
        for step in bar:
            for optimizer, peak in zip(optimizers, peaks, strict=True):
                optimizer.param_groups[0]["lr"] = peak * min((step + 1) / 50, 1.0) * (1 - step / steps)
            loss = loss_of(step)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad()
            if step % 10 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")


def _homework(tokenizer, problems, rng, batch_size):
    """Endless batches `(input_ids, attention_mask, maskable)`: prompt, answer, end of text, end-of-text padding."""
    prompts = tokenizer([problem.prompt for problem in problems])["input_ids"]
    answers = tokenizer([students_answer(problem, rng) for problem in problems])["input_ids"]
    longest = max(map(len, prompts))
    while True:
        rows = rng.sample(range(len(problems)), batch_size)
        input_ids = torch.full((batch_size, longest + MAX_NEW_TOKENS), tokenizer.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        maskable = torch.zeros_like(input_ids, dtype=torch.bool)
        for b, i in enumerate(rows):
            # The canvas of `generate` is longer than the answer and the model must fill the rest with ends of text;
            # preference pairs are scored without that rest. Random lengths make the model know both.
            canvas = rng.randint(len(answers[i]) + 1, MAX_NEW_TOKENS)
            response = answers[i] + [tokenizer.eos_token_id] * (canvas - len(answers[i]))
            begin = longest - len(prompts[i])
            input_ids[b, begin : longest + canvas] = torch.tensor(prompts[i] + response)
            attention_mask[b, begin : longest + canvas] = 1
            maskable[b, longest : longest + canvas] = True
        yield input_ids, attention_mask, maskable


def _loss(model, batch) -> torch.Tensor:
    """The negative ELBO per token (arXiv 2502.09992, equation 14: l of L' tokens masked, weight L'/l)."""
    input_ids, attention_mask, maskable = batch
    size, length = len(input_ids), maskable.sum(1)
    levels = (torch.randperm(size) + torch.rand(size)) / size  # one in each of `size` equal bins: stratified
    num_masked = (levels * length).ceil().long().clamp(min=1)
    ranks = torch.rand(input_ids.shape).masked_fill(~maskable, 2).argsort(1).argsort(1)
    masked = (ranks < num_masked.unsqueeze(1)) & maskable
    noised = input_ids.masked_fill(masked, model.config.mask_token_id)
    logits = model(input_ids=noised, attention_mask=attention_mask).logits
    nll = nn.functional.cross_entropy(logits[masked], input_ids[masked], reduction="none")
    weight = (length / num_masked).unsqueeze(1).expand_as(masked)[masked]
    return (nll * weight).sum() / length.sum()


def _optimizers(model, decay):
    """Muon for the matrices of the layers (several times fewer steps than AdamW here), AdamW for the rest."""
    vocabularies = [id(part.weight) for part in (model.get_input_embeddings(), model.get_output_embeddings())]
    matrices = [p for p in model.parameters() if p.ndim == 2 and id(p) not in vocabularies]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return torch.optim.Muon(matrices, lr=0.02, weight_decay=0.01), torch.optim.AdamW(rest, lr=3e-3, weight_decay=decay)
