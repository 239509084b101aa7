"""What the documents say of names, options, files and code is true."""

import ast
import contextlib
import dataclasses
import importlib
import inspect
import re
import shlex
import subprocess
from pathlib import Path

import options_page
import pytest
from test_architecture import ROOMS

import trl_diffusion
from trl_diffusion.trainers.arguments import ELBOArguments


def is_ours(thing):
    return isinstance(thing, type) and issubclass(thing, ELBOArguments)


ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
DOCUMENTS = [*(ROOT / page for page in PAGES), *sorted((ROOT / "docs").glob("*.md"))]
CONFIGS = [config for name in trl_diffusion.__all__ if is_ours(config := getattr(trl_diffusion, name))]
# What our configurations add to TRL's
OPTIONS = [
    (config, field)
    for config in CONFIGS
    for field in dataclasses.fields(config)
    if field.name not in {f.name for f in dataclasses.fields(config.__bases__[1])}
]
# (document, is it marked as tested, code)
BLOCKS = [
    (path.name, bool(mark), code)
    for path in DOCUMENTS
    for mark, code in re.findall(r"(<!-- tested -->\n)?```python\n(.*?)```", path.read_text(), re.DOTALL)
]
OPTIMISER = {
    "lr_scheduler_type": "cosine",
    "weight_decay": 0.01,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "num_train_epochs": 1,
    "max_length": 4096,
}
ESTIMATOR = {
    "num_mc_samples": 8,
    "mask_scheme": "fixed_count",
    "stratify": False,
    "control_variate": "none",
    "couple_pairs": False,
    "share_draws": True,
}
PAPERS = {
    "DiffusionVRPOConfig": {  # arXiv 2505.19223, appendix D; 64 pairs a step
        **ESTIMATOR,
        **OPTIMISER,
        "loss_type": ["sigmoid", "sft"],
        "loss_weights": [1.0, 0.05],
        "beta": 0.2,
        "learning_rate": 5e-7,
        "warmup_steps": 15,
        "per_device_train_batch_size": 64 // 8 // 8,
        "gradient_accumulation_steps": 8,
    },
    "ELBOKTOConfig": {  # the code of arXiv 2510.23658; 8 rows a step
        **ESTIMATOR,
        **OPTIMISER,
        "precompute_ref_log_probs": True,
        "loss_type": "kto",
        "baseline": "batch_mean",
        "beta": 0.1,
        "desirable_weight": 1.0,
        "undesirable_weight": 1.0,
        "learning_rate": 1e-6,
        "warmup_steps": 0.03,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "append_eos": False,
    },
}


def text_of(name):
    return (ROOT / name).read_text()


@pytest.mark.parametrize("name", trl_diffusion.__all__)
def test_public_names_are_described(name):
    assert f"\n### `{name}`\n" in text_of("docs/api.md")


def test_nothing_else_is_described_as_public():
    assert set(re.findall(r"^### `(\w+)`$", text_of("docs/api.md"), re.MULTILINE)) == set(trl_diffusion.__all__)


@pytest.mark.parametrize("config, field", OPTIONS, ids=[f"{c.__name__}.{f.name}" for c, f in OPTIONS])
def test_options_are_described_from_their_help(config, field):
    """The text stands once, in the field: the docstring and the page have it, with the default where it is one."""
    text = squeezed(field.metadata["help"])
    name = getattr(field.type, "__name__", str(field.type).split(" | ")[0])
    default = f'"{field.default}"' if isinstance(field.default, str) else str(field.default)
    suffix = "" if field.default is None else f", defaults to `{default}`"
    assert squeezed(f" {field.name} (`{name}`, *optional*{suffix}): {text}") in squeezed(config.__doc__)
    (row,) = [line for line in text_of("docs/options.md").splitlines() if line.startswith(f"| `{field.name}` | `")]
    assert f"`{default}`" in row.split(" | ")[1] and text in squeezed(row)


def squeezed(text):
    return re.sub(r"\s+", " ", text.replace("'", '"'))


def test_the_page_of_options_is_that_of_the_code():
    assert options_page.PAGE.read_text() == options_page.page(), "python docs/options_page.py"


def test_every_group_of_options_begins_with_one():
    for config in CONFIGS:
        assert set(config.groups) <= {field.name for of, field in OPTIONS if of is config}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#\s]+)", path.read_text()):
        if not target.startswith(("http:", "https:")):
            assert (path.parent / target).exists(), target


def test_named_tests_and_functions_exist():
    """`test_x.py::test_y` is a test; `room.module.name` in the tables of docs/method.md is in that module."""
    for path in DOCUMENTS:
        for file, name in re.findall(r"(test_\w+\.py)::(test_\w+)", path.read_text()):
            assert f"\ndef {name}(" in text_of(f"tests/{file}"), f"{path.name}: {file}::{name}"
    tables = "".join(line for line in text_of("docs/method.md").splitlines() if line.startswith("|"))
    named = re.findall(rf"`((?:{'|'.join(ROOMS)})\.[\w.]+)`", tables)
    assert len(named) > 20
    for name in named:
        file, parts = ROOT / "trl_diffusion", name.split(".")
        while file.is_dir():
            file = file / parts.pop(0)
            file = file if file.is_dir() else file.with_suffix(".py")
        scope = ast.parse(file.read_text()).body
        for part in parts:
            (found,) = [node for node in scope if getattr(node, "name", None) == part]
            scope = found.body


NOT_OURS = ("trl", "transformers", "peft", "accelerate", "lm_eval")


def installed(name):
    """The object of that full path; an attribute after `()` is one that the class gives its objects itself."""
    path, _, attribute = name.partition("().")
    parts, found = path.split("."), None
    for end in range(len(parts), 0, -1):
        with contextlib.suppress(ImportError):
            found = importlib.import_module(".".join(parts[:end]))
            break
    for part in parts[end:]:
        fields = getattr(found, "__dataclass_fields__", {})
        found = fields[part] if part in fields else getattr(found, part)
    if attribute:
        sources = [inspect.getsource(kind) for kind in found.__mro__ if kind.__module__.startswith(NOT_OURS)]
        assert any(f"self.{attribute} = " in source for source in sources), name
    return found


def test_the_names_of_the_contracts_exist():
    """In the installed versions; and what is imported is on the page, but for what transformers shows at its top."""
    rows = [line.split("|")[1:3] for line in text_of("docs/contracts.md").splitlines() if line.startswith("| `")]
    pattern = rf"`((?:{'|'.join(NOT_OURS)})\.[\w.()]+)`"
    written = {name for row in rows for cell in row for name in re.findall(pattern, cell)}
    assert len(written) > 60
    for name in written:
        installed(name)
    for path in (ROOT / "trl_diffusion").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or node.level or node.module == "transformers":
                continue
            if node.module.split(".")[0] in NOT_OURS:
                for alias in node.names:
                    name = f"{node.module}.{alias.name}"
                    assert any(f"{known}.".startswith((f"{name}.", f"{name}().")) for known in written), (path, name)


def test_the_contracts_are_found():
    for page in ("README.md", "CONTRIBUTING.md"):
        assert "](docs/contracts.md)" in text_of(page), page


def test_the_map_of_the_code_is_the_house():
    written = re.findall(r"^    (\w+)/ +\S", text_of("CONTRIBUTING.md"), re.MULTILINE)
    assert written == list(ROOMS)


@pytest.mark.parametrize("name, is_tested, code", BLOCKS, ids=[f"{name}{i}" for i, (name, _, _) in enumerate(BLOCKS)])
def test_python_blocks(name, is_tested, code):
    compiled = compile(code, name, "exec")
    if is_tested:
        exec(compiled, {})


def test_some_blocks_are_run():
    tested = {"README.md", "memory-and-speed.md"}
    assert {name for name, is_tested, _ in BLOCKS if is_tested} == tested


@pytest.mark.parametrize("config, expected", PAPERS.items())
def test_the_papers_configurations(tmp_path, config, expected):
    (code,) = [code for name, _, code in BLOCKS if name == "paper-index.md" and f"{config}(" in code]
    (call,) = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    given = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    assert set(given) == {*expected, "output_dir"}
    given |= {"output_dir": str(tmp_path), "bf16": False, "use_cpu": True}
    args = getattr(trl_diffusion, config)(**given)
    assert {name: getattr(args, name) for name in expected} == expected


@pytest.mark.parametrize(
    "name, number",
    [
        ("README.md", 1),
        ("examples/vrpo_lora.py", 3),
        ("examples/elbo_kto_lora.py", 3),
        ("examples/iterative_vrpo.py", 2),
        ("examples/diagnose_variance.py", 1),
    ],
)
def test_commands_have_known_options_only(name, number, tmp_path):
    scripts = "vrpo_lora|elbo_kto_lora|iterative_vrpo|diagnose_variance"
    commands = re.findall(rf"```bash\n[^`]*?examples/({scripts})\.py(.*?)```", text_of(name), re.DOTALL)
    assert len(commands) == number
    for script, options in commands:
        options = shlex.split(options.replace("\\\n", " "))
        if not options:  # the script makes a model itself
            continue
        options += ["--output_dir", str(tmp_path), "--bf16", "False", "--use_cpu", "True"]
        if script == "elbo_kto_lora":
            options += ["--per_device_train_batch_size", "4"]  # one row on each of several processes
        parser = importlib.import_module(script).make_parser()
        parser.parse_args_and_config(options, fail_with_unknown_args=True)


def test_no_file_knows_the_machine_it_was_written_on():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    forbidden = re.compile("|".join(["/" + "(work|root|tmp|home)/", "index" + "-url", "pypi[.]", "[/]simple\\b"]))
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if not path.is_file():
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        assert not (found := forbidden.search(text)), f"{name}: {found[0]}"


@pytest.mark.parametrize("name", ["vrpo_lora", "elbo_kto_lora", "iterative_vrpo"])
def test_the_scripts_can_say_what_their_options_are(name):
    """A stray percent sign in a help text breaks argparse."""
    parser = importlib.import_module(name).make_parser()
    assert "--num_mc_samples" in parser.format_help()
