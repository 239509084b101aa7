"""README's way from a dataset to an answer, run as it stands but for the names on the hub: these become folders."""

import contextlib
import io
import re
from pathlib import Path

import pytest
from conftest import make_model, make_pairs, make_tokenizer

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def block(name):
    """The Python block of README that is marked with that name."""
    (code,) = re.findall(rf"<!-- tested: {name} -->\n```python\n(.*?)```", README, re.DOTALL)
    return code


def run(code, **replaced):
    """Run a block with other texts in place of some of it; answer with its names and with what it printed."""
    for old, new in replaced.values():
        assert old in code, f"README has no {old} any more"
        code = code.replace(old, new)
    names, printed = {}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), names)
    return names, printed.getvalue()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning", "ignore:`is_gradient_check:FutureWarning")
def test_train_use_merge_and_serve(tmp_path, monkeypatch):
    """
    Trained with the defaults of a user: bf16, layer checkpointing, a model by path in bfloat16. Used in float32, where
    merging rounds nothing that could change an answer.
    """
    monkeypatch.chdir(tmp_path)
    make_model().save_pretrained("base")
    make_tokenizer().save_pretrained("base")
    make_pairs().to_json("pairs.jsonl")
    trained, _ = run(
        block("train"),
        model=('"GSAI-ML/LLaDA-8B-Instruct"', '"base"'),
        data=('"trl-lib/ultrafeedback_binarized"', '"json", data_files="pairs.jsonl"'),
        device=('"LLaDA-8B-VRPO",', '"LLaDA-8B-VRPO", use_cpu=True, max_steps=1, disable_tqdm=True, report_to="none",'),
    )
    history = trained["trainer"].state.log_history
    assert history[-1]["train_loss"] == pytest.approx(0.6931, abs=1e-4)  # ln 2
    names, printed = run(
        block("use"), dtype=('dtype="bfloat16"', 'dtype="float32"'), length=("max_new_tokens=128", "max_new_tokens=16")
    )
    unmerged, served = printed.splitlines()
    assert names["answer"].shape[1] == names["prompt"]["input_ids"].shape[1] + 16
    assert unmerged == served.strip() != ""
