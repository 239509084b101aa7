"""
Stories from a grammar with long-range structure: word-level text of any length that a small model learns on a CPU.

    Ida the sailor lives near the pier . Tom the fisher helps her . one day she loses a salty rope .
    ->  she puts the wet shell in the harbour . Tom asks ( Ida hauls the net ) says he .
        the wet shell is still in the harbour . at last Ida the sailor finds the salty rope near the pier .

What holds a story together: a pronoun agrees with a name, a thing that was put away is found where it was put, brackets
that were opened are closed by the one who opened them, the topic of the first sentence governs every word, and the last
sentence says again who lost what and where. A story is a list of `Slot`s. Each knows the words that would break it, so
a story can be spoilt in as many places as one likes.

Everything is made from a seed; nothing is downloaded.
"""

import math
import random
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import word_problems
from word_problems import EOS

from trl_diffusion.models import LLaDAModelLM

NAMES = {"Ben": "he", "Tom": "he", "Max": "he", "Jon": "he", "Ann": "she", "Eva": "she", "Zoe": "she", "Ida": "she"}
OBJECT = {"he": "him", "she": "her"}
KINDS = ("roles", "places", "things", "verbs", "adjectives")
TOPICS = {
    name: dict(zip(KINDS, (words.split() for words in lines.split("/")), strict=True))
    for name, lines in {
        "sea": "sailor fisher / harbour beach island pier / boat net shell rope sail anchor / hauls ties mends spots / "
        "salty wet blue",
        "farm": "farmer shepherd / barn field orchard well / plough cart gate egg bucket spade / lifts feeds fills "
        "fixes / dusty heavy brown",
        "kitchen": "cook baker / pantry cellar oven table / pot spoon cake pan jug bowl / stirs heats cleans tastes / "
        "hot sweet white",
        "castle": "knight guard / tower hall gatehouse moat / sword crown shield flag helmet horn / guards polishes "
        "raises hides / golden royal sharp",
        "forest": "hunter ranger / clearing cave river hut / bow trap log berry feather acorn / follows cuts gathers "
        "burns / mossy green wild",
    }.items()
}
FUNCTION_WORDS = (
    ". the a lives near helps one day loses puts in is still ( ) [ ] asks tells says gives then rests but does not "
    "find at last finds goes to"
)
SHORTEST_SENTENCE = 4  # and there are sentences of five, six and seven words, so every length can be made


@dataclass(frozen=True)
class Slot:
    """A word, and the words that would break the story in its place."""

    word: str
    wrong: tuple[str, ...] = ()


class Teller:
    """Tells one story: keeps what a later sentence has to agree with."""

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.topic = rng.choice(list(TOPICS))
        self.hero, self.helper = rng.sample(list(NAMES), 2)
        self.roles = rng.sample(TOPICS[self.topic]["roles"], 2)
        self.home, self.lost = self.pick("places").word, [self.pick("adjectives").word, self.pick("things").word]
        self.put_away: list[tuple[str, str, str]] = []
        self.subject = self.hero  # of the sentence before: whom a pronoun means

    def pick(self, kind: str) -> Slot:
        """A word of the topic; any word of another topic would be wrong."""
        return Slot(self.rng.choice(TOPICS[self.topic][kind]), self.elsewhere(kind))

    def elsewhere(self, kind: str) -> tuple[str, ...]:
        return tuple(word for name, words in TOPICS.items() if name != self.topic for word in words[kind])

    def again(self, kind: str, word: str) -> Slot:
        """A word that the story has fixed before; the others of its topic would be wrong."""
        return Slot(word, tuple(other for other in TOPICS[self.topic][kind] if other != word))

    def name(self, person: str) -> Slot:
        return Slot(person, tuple(name for name in NAMES if name not in (self.hero, self.helper)))

    def pronoun(self, person: str, form=lambda word: word) -> Slot:
        right = NAMES[person]
        return Slot(form(right), tuple(form(word) for word in OBJECT if word != right))

    def opening(self) -> list[str]:
        he = NAMES[self.hero]
        told = f"{self.hero} the {self.roles[0]} lives near the {self.home} . "
        told += f"{self.helper} the {self.roles[1]} helps {OBJECT[he]} . "
        return (told + f"one day {he} loses a {' '.join(self.lost)} .").split()

    def closing(self) -> list[Slot]:
        role, adjective = self.again("roles", self.roles[0]), self.again("adjectives", self.lost[0])
        thing, home = self.again("things", self.lost[1]), self.again("places", self.home)
        begin = [*plain("at last"), self.name(self.hero), *plain("the"), role, *plain("finds the"), adjective, thing]
        return [*begin, *plain("near the"), home, *plain(".")]

    def someone(self) -> tuple[str, Slot]:
        """The subject of the next sentence: a name, or a pronoun where the sentence before had the same subject."""
        person = self.rng.choice([self.hero, self.helper])
        same, self.subject = person == self.subject, person
        return person, self.pronoun(person) if same and self.rng.random() < 0.7 else self.name(person)

    def sentence(self) -> list[Slot]:
        kinds = [self.does, self.does, self.rests, self.goes, self.gives, self.puts, self.misses, self.speaks]
        kinds += [self.recalls] * min(3, len(self.put_away))
        return self.rng.choice(kinds)()

    def does(self) -> list[Slot]:
        adjective = [self.pick("adjectives")] if self.rng.random() < 0.5 else []
        return [self.someone()[1], self.pick("verbs"), *plain("the"), *adjective, self.pick("things"), *plain(".")]

    def rests(self) -> list[Slot]:
        return [*plain("then"), self.someone()[1], *plain("rests .")]

    def goes(self) -> list[Slot]:
        adjective = [self.pick("adjectives")] if self.rng.random() < 0.5 else []
        return [self.someone()[1], *plain("goes to the"), *adjective, self.pick("places"), *plain(".")]

    def gives(self) -> list[Slot]:
        person, subject = self.someone()
        other = self.helper if person == self.hero else self.hero
        given = [*plain("the"), self.pick("things"), *plain(".")]
        return [subject, *plain("gives"), self.pronoun(other, OBJECT.get), *given]

    def puts(self) -> list[Slot]:
        adjective, thing, place = (self.pick(kind) for kind in ("adjectives", "things", "places"))
        told = [self.someone()[1], *plain("puts the"), adjective, thing, *plain("in the"), place, *plain(".")]
        self.put_away.append((adjective.word, thing.word, place.word))
        return told

    def recalls(self) -> list[Slot]:
        adjective, thing, place = self.put_away.pop(self.rng.randrange(len(self.put_away)))
        kept = [self.again("adjectives", adjective), self.again("things", thing)]
        return [*plain("the"), *kept, *plain("is still in the"), self.again("places", place), *plain(".")]

    def misses(self) -> list[Slot]:
        adjective, thing = self.again("adjectives", self.lost[0]), self.again("things", self.lost[1])
        return [*plain("but"), self.someone()[1], *plain("does not find the"), adjective, thing, *plain(".")]

    def speaks(self, depth: int = 1) -> list[Slot]:
        """Speech in brackets, in which someone may speak again, in brackets of the other shape."""
        left, right, wrong = ("(", ")", "]") if depth == 1 else ("[", "]", ")")
        speaker, subject = self.someone()
        inner = self.speaks(depth + 1) if depth < 2 and self.rng.random() < 0.4 else self.does()
        more = self.goes() if self.rng.random() < 0.3 else []
        verb = Slot("asks" if depth == 1 else "tells")
        said = [subject, verb, Slot(left), *inner, *more, Slot(right, (wrong,)), *plain("says"), self.pronoun(speaker)]
        self.subject = speaker
        return [*said, *plain(".")]


def plain(words: str) -> list[Slot]:
    return [Slot(word) for word in words.split()]


def tell(rng: random.Random, length: int) -> tuple[list[str], list[Slot]]:
    """An opening, and a story to it of exactly `length` words with its end of text."""
    teller = Teller(rng)
    return teller.opening(), continue_story(teller, length)


def continue_story(teller: Teller, length: int) -> list[Slot]:
    closing = [*teller.closing(), Slot(EOS)]
    left, told = length - len(closing), []
    if left < SHORTEST_SENTENCE:
        raise ValueError(f"A story has at least {len(closing) + SHORTEST_SENTENCE} words, got length={length}.")
    while left:
        before = (teller.subject, list(teller.put_away))
        sentence = teller.sentence()
        rest = left - len(sentence)
        if rest != 0 and rest < SHORTEST_SENTENCE:  # could not be filled: try another
            teller.subject, teller.put_away = before
            continue
        told, left = told + sentence, rest
    return told + closing


def spoil(story: list[Slot], share: float, rng: random.Random) -> list[str]:
    """The words of a story, with this share of those that can be wrong made wrong: at least one, unless it is 0."""
    places = [i for i, slot in enumerate(story) if slot.wrong]
    count = min(len(places), max(1, round(share * len(places)))) if share else 0
    wrong = set(rng.sample(places, count))
    return [rng.choice(slot.wrong) if i in wrong else slot.word for i, slot in enumerate(story)]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word."""
    words = [*NAMES, *OBJECT, *OBJECT.values(), *FUNCTION_WORDS.split()]
    words += [word for topic in TOPICS.values() for kind in KINDS for word in topic[kind]]
    return word_problems.make_word_tokenizer(words)


def make_model(tokenizer) -> LLaDAModelLM:
    """A LLaDA of three quarters of a million parameters."""
    return word_problems.make_model(tokenizer, n_layers=4, max_sequence_length=320)


# --- a model of the stories ------------------------------------------------------------------------------------------

LENGTHS = (24, 32, 48, 64, 96, 128, 192, 256)
TOKENS_PER_STEP = 2048
SPOILT_SHARE = 0.2  # of the stories to learn from: the model has seen bad ones, and knows that they are rarer
MOST_SPOILT = 0.4


def make_batch(tokenizer, length: int, size: int, rng: random.Random, spoilt_share=SPOILT_SHARE):
    """`size` stories of one length: ids `(size, prompt + length)` and the length of the prompt."""
    rows = []
    for _ in range(size):
        opening, story = tell(rng, length)
        share = rng.uniform(0, MOST_SPOILT) if rng.random() < spoilt_share else 0
        rows.append(opening + spoil(story, share, rng))
    ids = tokenizer.convert_tokens_to_ids
    return torch.tensor([ids(row) for row in rows]), len(opening)


def pretrain(tokenizer, seed: int, steps=1500):
    """Train on stories of all lengths, the short ones first: what binds distant words is learned on them sooner."""
    torch.manual_seed(seed)
    rng, model = random.Random(seed), make_model(tokenizer)

    def loss_of(step):
        length = rng.choice(LENGTHS[: 3 + round(5 * min(1.0, 2 * step / steps))])
        ids, prompt = make_batch(tokenizer, length, max(1, TOKENS_PER_STEP // (length + 22)), rng)
        return -elbo_per_token(model, ids, prompt)

    word_problems.train(model, loss_of, steps, decay=0.01, label="pre-training on stories")
    return model.eval()


def elbo_per_token(model, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """A Monte Carlo ELBO of the responses in nats per token, one stratified level for each row (LLaDA's eq. 14)."""
    size, length = ids.shape[0], ids.shape[1] - prompt
    levels = (torch.randperm(size) + torch.rand(size)) / size
    num_masked = (levels * length).ceil().long().clamp(min=1)
    masked = torch.rand(size, length).argsort(1).argsort(1) < num_masked.unsqueeze(1)
    masked = torch.cat([torch.zeros(size, prompt, dtype=torch.bool), masked], dim=1)
    hidden = model.base_model(input_ids=ids.masked_fill(masked, model.config.mask_token_id)).last_hidden_state
    logits = model.get_output_embeddings()(hidden[masked])
    log_probs = -nn.functional.cross_entropy(logits, ids[masked], reduction="none")
    weight = (length / num_masked).unsqueeze(1).expand_as(masked)[masked]
    return (log_probs * weight).sum() / (size * length)


def report_quality(model, tokenizer, length: int, size=256, seed=10**6) -> dict[str, float]:
    """Nats per token on new stories without errors: of the model (a bound), and of counted words and pairs of words."""
    training = make_batch(tokenizer, length, 4000, random.Random(seed + 1), spoilt_share=0)
    ids, prompt = make_batch(tokenizer, length, size, random.Random(seed), spoilt_share=0)
    with torch.no_grad():
        own = torch.stack([elbo_per_token(model, part, prompt) for part in ids.split(64) for _ in range(4)]).mean()
    unigram, bigram = _counted(training[0], prompt, ids, len(tokenizer))
    return {"model": -own.item(), "bigram": bigram, "unigram": unigram}


def _counted(training: torch.Tensor, prompt: int, ids: torch.Tensor, vocabulary: int) -> tuple[float, float]:
    """Cross entropies of the responses in `ids` under the words, and the pairs of words, of `training`."""
    seen, seen_before = (training[:, part].flatten().tolist() for part in (slice(prompt, None), slice(prompt - 1, -1)))
    words, first, pairs = Counter(seen), Counter(seen_before), Counter(zip(seen_before, seen, strict=True))
    total, small = sum(words.values()), 0.01
    one, two = 0.0, 0.0
    targets, befores = (ids[:, part].flatten().tolist() for part in (slice(prompt, None), slice(prompt - 1, -1)))
    for before, word in zip(befores, targets, strict=True):
        one -= math.log((words[word] + small) / (total + small * vocabulary))
        two -= math.log((pairs[before, word] + small) / (first[before] + small * vocabulary))
    return one / len(targets), two / len(targets)
