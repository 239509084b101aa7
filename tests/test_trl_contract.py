"""
What this package relies on inside TRL. When one of these fails, TRL has moved: read door.py, then its new code.
"""

import contextlib
import importlib
import inspect
import re
from importlib.metadata import version
from unittest import mock

import pytest
import torch
from conftest import make_model
from test_trainers import make_trainer
from transformers import Trainer
from trl import DPOTrainer, KTOTrainer, SFTTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from trl_diffusion.checks.options import DPO_LOSS_TYPES, KTO_LOSS_TYPES, SFT_LOSS_TYPES
from trl_diffusion.scoring import door
from trl_diffusion.scoring.door import SEAM_NAMES, ChunkedLogProbFunction, FusedCausalLMOutput, seam
from trl_diffusion.trainers import base

TRL = f"trl {version('trl')}"
TRAINERS = {"trl.trainer.dpo_trainer": DPOTrainer, "trl.trainer.kto_trainer": KTOTrainer}


@pytest.mark.parametrize("module, trainer", TRAINERS.items())
def test_the_constructor_looks_up_the_seam_names_in_order(module, trainer):
    source = inspect.getsource(trainer.__init__)
    places = [source.find(f"{name}(") for name in SEAM_NAMES]
    assert all(place > 0 for place in places) and places == sorted(places), TRL
    assert all(hasattr(importlib.import_module(module), name) for name in SEAM_NAMES), TRL
    last = source.rfind("add_fused_lm_head(")
    assert last < source.index("self._precompute_ref_logps("), f"{TRL}: the head must be there before precomputation"
    assert last < source.index("prepare_model("), f"{TRL}: and before the reference is prepared"


def test_sft_goes_through_the_same_seam():
    """Its loss is a sum of `log_probs` over what the Trainer counted."""
    source, step = inspect.getsource(SFTTrainer.__init__), inspect.getsource(SFTTrainer.compute_loss)
    places = [source.index(f" {name}(") for name in SEAM_NAMES]
    assert places == sorted(places), TRL
    assert re.search(r"outputs = model\(\*\*inputs, fused_lm_head=True\)\s+per_token_loss = -outputs.log_probs", step)
    assert "outputs.label_mask.sum() if num_items_in_batch is None else num_items_in_batch" in step, TRL
    assert set(re.findall(r'loss_type == "(\w+)"', step)) == {"dft", "nll"}, TRL
    names = list(inspect.signature(SFTTrainer.__init__).parameters)[1:7]
    assert names == ["model", "args", "data_collator", "train_dataset", "eval_dataset", "processing_class"], TRL
    assert list(inspect.signature(SFTTrainer._prepare_dataset).parameters)[-1] == "dataset_name", TRL
    assert SFT_LOSS_TYPES == ("nll",)


def test_the_trainer_counts_what_an_sft_loss_is_divided_by():
    """Of `shift_labels` if there are any, which is how examples are counted instead of tokens."""
    source = inspect.getsource(Trainer._get_num_items_in_batch)
    assert 'batch["shift_labels"]\n                    if "shift_labels" in batch' in source
    rows = [{"input_ids": [3, 4, 5], "labels": [-100, 4, 5]}, {"input_ids": [6, 7], "labels": [-100, 7]}]
    batch = DataCollatorForLanguageModeling(pad_token_id=0)(rows)
    assert batch["labels"].tolist() == [[-100, 4, 5], [-100, 7, -100]], TRL
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]], TRL


def test_the_random_state_is_saved_last_but_for_the_trainers_state():
    """There a checkpoint gets the list of its files; nothing that is read on resuming may be written later."""
    source = inspect.getsource(Trainer._save_checkpoint)
    names = ("save_model", "_save_optimizer_and_scheduler", "_save_scaler", "_save_rng_state", "state.save_to_json")
    places = [source.find(f"self.{name}(") for name in (*names, "_push_from_checkpoint")]
    places.append(source.find("rotate_checkpoints("))
    assert all(place > 0 for place in places) and places == sorted(places), f"transformers {version('transformers')}"


@pytest.mark.parametrize("trainer", TRAINERS.values())
def test_log_probabilities_come_from_one_expression(trainer):
    source = inspect.getsource(trainer._compute_loss) + inspect.getsource(trainer.compute_ref_log_probs)
    assert "fused_lm_head=True" in source and ".log_probs" in source, TRL
    assert "log_softmax" not in source and "selective_log_softmax" not in source, f"{TRL} scores logits again"
    assert list(inspect.signature(trainer._compute_loss).parameters) == ["self", "model", "inputs", "return_outputs"], (
        TRL
    )
    assert list(inspect.signature(trainer.compute_ref_log_probs).parameters) == ["self", "model", "inputs"], TRL


@pytest.mark.parametrize("trainer", TRAINERS.values())
def test_the_constructor_takes_its_arguments_in_this_order(trainer):
    theirs = list(inspect.signature(trainer.__init__).parameters)
    assert theirs == list(inspect.signature(base.ELBOTrainerMixin.__init__).parameters), TRL


@pytest.mark.parametrize("module", TRAINERS)
def test_a_step_reads_the_reference_from_the_batch(module):
    source = inspect.getsource(TRAINERS[module]._compute_loss)
    names = ("ref_chosen_logps", "ref_rejected_logps") if "dpo" in module else ("ref_logps", "ref_KL_logps")
    assert "if self.precompute_ref_logps:" in source, TRL
    assert all(f'["{name}"]' in source for name in names), TRL


def test_one_attribute_says_whether_there_are_mismatched_pairs():
    """It is set once; what reads it afterwards is what `baseline` answers."""
    source = inspect.getsource(KTOTrainer)
    assert re.findall(r"self\.calculate_KL = .*", source) == ["self.calculate_KL = calculate_kl"], TRL
    for method in (KTOTrainer._prepare_dataset, KTOTrainer.compute_ref_log_probs):
        assert "if self.calculate_KL:" in inspect.getsource(method), TRL
        assert "loss_type" not in inspect.getsource(method), TRL


def test_what_the_collators_give():
    """Padded on the right; chosen rows before rejected ones, and mismatched ones under names of their own."""
    rows = [{"prompt_ids": [3], "own": [4, 5], "other": [6]}, {"prompt_ids": [7, 8], "own": [9], "other": [10, 11]}]
    padded = {"own": [[3, 4, 5], [7, 8, 9]], "other": [[3, 6, 0], [7, 8, 10]]}
    pairs = [{"prompt_ids": r["prompt_ids"], "chosen_ids": r["own"], "rejected_ids": r["other"]} for r in rows]
    batch = DataCollatorForPreference(pad_token_id=0, max_length=3)(pairs)
    assert batch["input_ids"].tolist() == padded["own"] + padded["other"], TRL
    assert batch["completion_mask"].tolist() == [[0, 1, 1], [0, 0, 1], [0, 1, 0], [0, 0, 1]], TRL
    single = [
        {"prompt_ids": r["prompt_ids"], "completion_ids": r["own"], "KL_completion_ids": r["other"], "label": True}
        for r in rows
    ]
    batch = DataCollatorForUnpairedPreference(pad_token_id=0, max_length=3)(single)
    assert batch["input_ids"].tolist() == padded["own"] and batch["KL_input_ids"].tolist() == padded["other"], TRL
    assert batch["KL_attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]], TRL
    assert batch["KL_completion_mask"].tolist() == [[0, 1, 0], [0, 0, 1]], TRL


def test_the_arguments_of_the_kernel():
    theirs = list(inspect.signature(ChunkedLogProbFunction.forward).parameters)
    assert theirs[1:6] == ["hidden", "weight", "bias", "targets", "temperature"], TRL
    assert theirs[6:] == ["chunk_size", "final_logit_softcapping", "logit_scale", "outputs"], TRL


def test_evaluation_goes_through_one_loop():
    """What it returns is logged, and TRL adds its metrics to the very dict that picks the best checkpoint."""
    evaluate = inspect.getsource(Trainer.evaluate)
    assert evaluate.index("self.evaluation_loop(") < evaluate.index("self.log(output.metrics)")
    assert "return output.metrics" in evaluate
    assert all("logs.update(metrics)" in inspect.getsource(trainer.log) for trainer in TRAINERS.values()), TRL


def test_fields_of_the_fused_output():
    fields = set(FusedCausalLMOutput.__dataclass_fields__)
    assert {"loss", "log_probs", "entropy", "mean_logits", "is_top1", "label_mask"} <= fields, TRL


def test_a_trainer_without_the_head_refuses_to_be_made(tmp_path):
    """If TRL no longer went through the seam, the model would be scored as a causal one, silently."""
    with (
        mock.patch.object(base.ELBOTrainerMixin, "_inside_trl", lambda self: contextlib.nullcontext()),
        pytest.raises(RuntimeError, match=f"{TRL} has not asked for the ELBO head"),
    ):
        make_trainer(tmp_path)


def test_the_seam_is_closed_after_construction(tmp_path):
    module = importlib.import_module("trl.trainer.dpo_trainer")
    before = [getattr(module, name) for name in SEAM_NAMES]
    make_trainer(tmp_path)
    assert [getattr(module, name) for name in SEAM_NAMES] == before
    with pytest.raises(AttributeError, match="Not a name of the seam"), seam("trl.trainer.dpo_trainer", pad=None):
        pass


def test_trl_itself_would_score_the_model_as_a_causal_one(tmp_path):
    """The error that the head makes impossible: TRL's own fused head shifts, masks nothing and does not complain."""
    from trl.trainer.utils import add_fused_lm_head

    model = make_model()
    ids = torch.randint(6, 29, (1, 8), generator=torch.Generator().manual_seed(0))
    logits = model(ids).logits.log_softmax(-1)
    add_fused_lm_head(model)
    causal = model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
    torch.testing.assert_close(causal, logits[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "found, message", [("1.15.2", "found trl 1.15.2"), ("1.17.0", "found trl 1.17.0"), (None, "need trl")]
)
def test_other_versions_are_refused(monkeypatch, found, message):
    def installed(name):
        if found is None:
            raise door.PackageNotFoundError
        return found

    monkeypatch.setattr(door, "version", installed)
    with pytest.raises(ImportError, match=message):
        door._check_trl()


def test_the_range_is_the_one_of_the_package_metadata():
    from importlib.metadata import requires

    (requirement,) = [r for r in requires("trl_diffusion") if r.startswith("trl<") or r.startswith("trl>")]
    assert set(requirement.replace("trl", "").split(",")) == {">=1.16", "<1.17"}
    assert door._TESTED_TRL == ((1, 16), (1, 17))


@pytest.mark.parametrize(
    "trainer, known", [(DPOTrainer, DPO_LOSS_TYPES), (KTOTrainer, KTO_LOSS_TYPES)], ids=["DPO", "KTO"]
)
def test_the_loss_types_are_those_of_trl(trainer, known):
    """TRL has no list of them: they are what its loss compares the option with."""
    source = inspect.getsource(trainer._compute_loss)
    assert set(re.findall(r'loss_type == "(\w+)"', source)) == set(known)
