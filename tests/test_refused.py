"""
The law: a model whose ELBO is another one, or that has none, is refused by its name and with the reason, whichever way
it comes, and before its remote code is asked for or run.
"""

import json
from types import SimpleNamespace

import pytest
import vrpo_lora
from conftest import make_model, make_pairs, make_tokenizer
from peft import LoraConfig, get_peft_model
from test_families import make_llama
from transformers import AutoConfig

from trl_diffusion import DiffusionVRPOConfig, DiffusionVRPOTrainer
from trl_diffusion.models.denoiser import check_denoiser
from trl_diffusion.models.families import FAMILIES, refuse_unscored

ANY_TOKEN = "replaces tokens by other tokens: any of them may be wrong.*hidden token is a mask token"
EDITS = "inserts, deletes and replaces tokens: its bound is on rates of edits"
REFUSED = {
    "diffusion_gemma": f"DiffusionGemma .*{ANY_TOKEN}",
    "diffusion_gemma_text": f"DiffusionGemma .*{ANY_TOKEN}",
    "udlm": f"UDLM .*{ANY_TOKEN}",
    "DUO": f"Duo .*{ANY_TOKEN}",
    "editflow": f"Edit Flows .*{EDITS}",
    "editflow-dream": f"Edit Flows .*{EDITS}",
    "editflow-llada": f"Edit Flows .*{EDITS}",
    "editflow-modernbert": f"Edit Flows .*{EDITS}",
    "editflow-qwen3": f"Edit Flows .*{EDITS}",
    "bd3lm": "BD3-LM ",
    "llada21_moe": "LLaDA2.1 under another name .*`model_type` is 'llada2_moe', and with that",
}


@pytest.fixture(params=REFUSED)
def model_type(request):
    return request.param


def write(path, model_type, **entries):
    """As published: with remote code, which must not be run."""
    entries = {"model_type": model_type, "block_size": 16, "architectures": ["Theirs"], **entries}
    entries["auto_map"] = {"AutoConfig": "theirs.Config", "AutoModel": "theirs.Model"}
    (path / "config.json").write_text(json.dumps(entries))
    (path / "theirs.py").write_text(f"open({str(path / 'was_run')!r}, 'w')\n")
    make_tokenizer(with_mask=True).save_pretrained(path)
    return path


def train(model, out, **options):
    arguments = DiffusionVRPOConfig(str(out), bf16=False, use_cpu=True, report_to=[], **options)
    return DiffusionVRPOTrainer(model, args=arguments, train_dataset=make_pairs(4), processing_class=make_tokenizer())


@pytest.mark.parametrize("trusts", [False, True])
def test_by_path(model_type, trusts, tmp_path):
    path = write(tmp_path, model_type)
    with pytest.raises(ValueError, match=f"This is {REFUSED[model_type]}"):
        train(str(path), tmp_path / "out", trust_remote_code=trusts)
    assert not (path / "was_run").exists()


def test_llada_2_2_is_told_by_the_rest_of_its_configuration(tmp_path):
    """It has the `model_type` of LLaDA2.0 and 2.1, whose class would load it."""
    path = write(tmp_path, "llada2_moe", delete_token_id=156930, split_token_id=156931)
    with pytest.raises(ValueError, match="This is LLaDA2.2 .*deletes and inserts tokens"):
        train(str(path), tmp_path / "out")
    assert not (path / "was_run").exists()


def test_as_the_base_of_an_adapter(tmp_path):
    get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    about = tmp_path / "adapter" / "adapter_config.json"
    base = str(write(tmp_path, "udlm"))
    about.write_text(json.dumps(json.loads(about.read_text()) | {"base_model_name_or_path": base}))
    with pytest.raises(ValueError, match="This is UDLM"):
        train(str(tmp_path / "adapter"), tmp_path / "out")


def test_by_the_script(tmp_path):
    path = write(tmp_path, "editflow-llada")
    make_pairs(4).to_json(tmp_path / "data" / "train.jsonl")
    arguments = ["--model_name_or_path", str(path), "--dataset_name", str(tmp_path / "data")]
    arguments += ["--output_dir", str(tmp_path / "out"), "--bf16", "False", "--use_cpu"]
    with pytest.raises(ValueError, match="This is Edit Flows"):
        vrpo_lora.main(*vrpo_lora.make_parser().parse_args_and_config(arguments, fail_with_unknown_args=True))


def test_in_memory(model_type, tmp_path):
    model = make_model()
    model.config = SimpleNamespace(model_type=model_type, block_size=16)
    with pytest.raises(ValueError, match=f"This is {REFUSED[model_type]}"):
        check_denoiser(model, 2)


def test_what_transformers_itself_has():
    with pytest.raises(ValueError, match="This is DiffusionGemma"):
        refuse_unscored(AutoConfig.for_model("diffusion_gemma"))


def test_all_with_other_noise_are_in_the_table():
    assert {name for family in FAMILIES if family.noise != "absorbing" for name in family.model_types} <= set(REFUSED)


def test_a_causal_model_by_path_and_in_memory(tmp_path):
    model = make_llama(is_causal=True)
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    for each in (str(tmp_path), model):
        with pytest.raises(ValueError, match="attends causally.*has a likelihood and no ELBO: `trl.DPOTrainer`"):
            train(each, tmp_path / "out")
