"""
A small diffusion language model of English, and two policies, for `natural_language.py`.

The published BERT-tiny (2 layers, 128 wide) is cut down to the 8000 wordpieces that the corpus uses and trained on it
as a masked diffusion model, in about two minutes of one core: 1.5 million weights, 5.7 nats for a hidden token of
unseen text (log 8000 is 9.0). A weak model of real English. The policies are VRPO with LoRA on answers to questions,
merged.
"""

import math
import random
from collections import Counter
from pathlib import Path

import natural_text
import torch
from datasets import Dataset
from peft import LoraConfig
from tqdm.auto import tqdm
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, BertTokenizer

from trl_diffusion import DiffusionVRPOConfig, DiffusionVRPOTrainer

VOCABULARY = 8000
HELD_OUT = 20  # one in so many paragraphs
STEPS, LEARNING_RATE, TOKENS_PER_STEP = 300, 1e-3, 1536
LENGTHS = (64, 128, 256, 512)
LOWEST_LEVEL = 0.05
POLICIES = {"near": (12, 1e-3), "far": (32, 2e-3)}  # steps, learning rate
SEED = 0


def split(texts: dict[str, list[str]]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Training and held-out paragraphs of each source."""
    training, held = {}, {}
    for name, paragraphs in texts.items():
        shuffled = random.Random(SEED).sample(paragraphs, len(paragraphs))
        size = len(shuffled) // HELD_OUT
        held[name], training[name] = shuffled[:size], shuffled[size:]
    return training, held


def load(root: Path, name: str) -> BertForMaskedLM:
    """The base model or a policy, in evaluation mode."""
    return BertForMaskedLM.from_pretrained(root / name).eval()


def load_tokenizer(root: Path) -> BertTokenizer:
    return AutoTokenizer.from_pretrained(root / "base")


def build(root: Path) -> None:
    """Make what is missing of the base model and the policies."""
    if not (root / "base" / "config.json").exists():
        training, held = split(natural_text.paragraphs(root))
        model, tokenizer = trimmed(root, training)
        adapt(model, tokenizer, training, held)
        tokenizer.save_pretrained(root / "base")
        model.save_pretrained(root / "base")
    for name, (steps, learning_rate) in POLICIES.items():
        if not (root / name / "config.json").exists():
            train_policy(root, name, steps, learning_rate)


def trimmed(root: Path, texts: dict[str, list[str]]) -> tuple[BertForMaskedLM, BertTokenizer]:
    """The published model and its tokenizer, with the most frequent wordpieces only, and every single character."""
    folder = root / "unpacked" / natural_text.MODEL
    whole, source = BertForMaskedLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    pieces = {i: piece for piece, i in source.get_vocab().items()}
    used: Counter[int] = Counter()
    for paragraphs in texts.values():
        for i in range(0, len(paragraphs), 2000):
            for ids in source(paragraphs[i : i + 2000], add_special_tokens=False)["input_ids"]:
                used.update(ids)
    plain = [i for i, piece in pieces.items() if piece.isascii() and not piece.startswith("[")]
    characters = [i for i in plain if len(pieces[i].removeprefix("##")) == 1]
    kept = dict.fromkeys([*source.all_special_ids, *characters, *sorted(plain, key=lambda i: -used[i])])
    ids = sorted(list(kept)[:VOCABULARY])
    vocabulary = {pieces[i]: new for new, i in enumerate(ids)}
    tokenizer = BertTokenizer(vocab=vocabulary, do_lower_case=True, model_max_length=512, eos_token="[SEP]")
    sizes = {"vocab_size": len(ids), "pad_token_id": 0, "mask_token_id": vocabulary["[MASK]"]}
    nothing_random = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = BertForMaskedLM(BertConfig.from_dict(whole.config.to_dict() | sizes | nothing_random))
    rows = torch.tensor(ids)
    state = whole.state_dict()
    model.load_state_dict({n: w[rows] if len(w) == whole.config.vocab_size else w for n, w in state.items() if w.dim()})
    return model, tokenizer


def adapt(model, tokenizer, training, held) -> None:
    """Train as a masked diffusion model: levels evenly spread over a batch, cross entropy of hidden tokens."""
    rng, generator = random.Random(SEED), torch.Generator().manual_seed(SEED)
    stream = token_stream(tokenizer, training, rng)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    scale = [min(1, (i + 1) / 50) * (0.05 + 0.475 * (1 + math.cos(math.pi * i / STEPS))) for i in range(STEPS)]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: scale[min(step, STEPS - 1)])
    model.train()
    for _ in tqdm(range(STEPS), desc="adapting"):
        length = rng.choice(LENGTHS)
        rows = TOKENS_PER_STEP // length
        starts = torch.randint(len(stream) - length, (rows, 1), generator=generator)
        loss = masked_loss(model, stream[starts + torch.arange(length)], generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    unseen = token_stream(tokenizer, held, rng)[: 64 * 128].view(64, 128)
    with torch.no_grad():
        print(f"nats per hidden held-out token: {masked_loss(model, unseen, generator):.2f}", flush=True)


def token_stream(tokenizer, texts: dict[str, list[str]], rng: random.Random) -> torch.Tensor:
    """All paragraphs in random order, each with its end."""
    paragraphs = [text for group in texts.values() for text in group]
    rng.shuffle(paragraphs)
    rows = tokenizer(paragraphs, add_special_tokens=False)["input_ids"]
    return torch.tensor([i for ids in rows for i in (*ids, tokenizer.sep_token_id)])


def masked_loss(model, ids: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    level = (torch.arange(len(ids)) + torch.rand(1, generator=generator)) / len(ids)
    masked = torch.rand(ids.shape, generator=generator) < (LOWEST_LEVEL + (1 - LOWEST_LEVEL) * level).unsqueeze(1)
    hidden = model.bert(input_ids=ids.masked_fill(masked, model.config.mask_token_id)).last_hidden_state[masked]
    return torch.nn.functional.cross_entropy(model.cls(hidden), ids[masked])


def subjects(rows: list[dict[str, str]]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Questions to train on, and those of the other subjects."""
    names = sorted({row["subject"] for row in rows})
    held = set(random.Random(SEED).sample(names, len(names) // 3))
    return [row for row in rows if row["subject"] not in held], [row for row in rows if row["subject"] in held]


def train_policy(root: Path, name: str, steps: int, learning_rate: float) -> None:
    """VRPO from the base model. The estimator is spelled out: a policy is the same whatever the defaults are."""
    rng = random.Random(SEED)
    rows, _ = subjects(natural_text.questions(root))
    pairs = [pair for kind in ("edited", "other") for pair in natural_text.answer_pairs(rows, kind, rng)]
    rng.shuffle(pairs)
    trainer = DiffusionVRPOTrainer(
        load(root, "base"),
        args=DiffusionVRPOConfig(
            str(root / f"{name}-run"),
            num_mc_samples=2,
            mask_scheme="mirror",
            stratify=True,
            control_variate="leave_one_out",
            couple_pairs=False,
            max_steps=steps,
            learning_rate=learning_rate,
            lr_scheduler_type="constant",
            per_device_train_batch_size=4,
            max_length=256,
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            logging_steps=10,
            seed=SEED,
        ),
        train_dataset=Dataset.from_list(pairs),
        processing_class=load_tokenizer(root),
        peft_config=LoraConfig(r=16, lora_alpha=32),
    )
    trainer.train()
    trainer.model.merge_and_unload().save_pretrained(root / name)
