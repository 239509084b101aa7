"""The house: rooms import rooms below them only, files and functions stay small, importing the package is cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_model

import trl_diffusion

ROOT = Path(trl_diffusion.__file__).parent
# From the ground up, and what a room may not know
ROOMS = {
    "estimators": {"trl", "transformers", "datasets", "accelerate", "peft", "bitsandbytes"},
    "models": {"trl", "peft", "datasets"},
    "scoring": {"datasets"},
    "checks": set(),
    "resuming": {"trl", "peft", "datasets"},
    "planning": set(),
    "trainers": set(),
    "diagnosis": set(),
    "evaluation": set(),
    "cli": set(),
}
ORDER = list(ROOMS)
DOOR = "scoring/door.py"  # the only way to TRL
FILES = sorted(path for path in ROOT.rglob("*.py") if path.parent != ROOT)
IDS = [str(path.relative_to(ROOT)) for path in FILES]


def imports_of(path: Path):
    """Full dotted name of every module that is imported, wherever the statement stands."""
    package = ["trl_diffusion", *path.relative_to(ROOT).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            yield ".".join([*base, *(node.module or "").split(".")]).rstrip(".")


def test_every_file_is_in_a_room_and_every_room_says_what_it_knows_and_does_not():
    assert {path.name for path in ROOT.glob("*.py")} == {"__init__.py", "_version.py", "_after_import.py"}
    assert sorted(path.name for path in ROOT.iterdir() if path.is_dir() and path.name != "__pycache__") == sorted(ROOMS)
    for room in ROOT.rglob("__init__.py"):
        if room.parent != ROOT:
            docstring = ast.get_docstring(ast.parse(room.read_text()))
            assert "\nKnows " in docstring and "Does not know" in docstring, room


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_imports_point_down(path):
    room, *inner = path.relative_to(ROOT).parent.parts
    for module in imports_of(path):
        top, *rest = module.split(".")
        if top != "trl_diffusion":
            assert top not in ROOMS[room], f"{path.name} imports {module}, of which {room}/ knows nothing"
            assert top != "trl" or str(path.relative_to(ROOT)) == DOOR, f"{path.name} goes to TRL past the door"
        elif rest and rest[0] in ROOMS:
            assert ORDER.index(rest[0]) <= ORDER.index(room), f"{room}/{path.name} imports {module} above it"
            if rest[0] == room and inner:  # one method, one room: it knows what is shared, and no other method
                below = (ROOT / room / rest[1]).is_dir()
                assert not below or rest[1] == inner[0], f"{path.name} imports {module} of the room beside it"


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_files_and_functions_are_small(path):
    assert len(path.read_text().splitlines()) <= 300
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            docstring = ast.get_docstring(node, clean=False)
            lines = node.end_lineno - node.lineno + 1 - (docstring.count("\n") + 1 if docstring else 0)
            assert lines <= 40, f"{path.name}: {node.name} has {lines} lines"


def test_every_public_name_can_be_imported():
    assert sorted(trl_diffusion.__all__) == sorted({*trl_diffusion._HOMES, "__version__"})
    for name in trl_diffusion.__all__:
        assert getattr(trl_diffusion, name) is not None
        assert getattr(trl_diffusion, name).__doc__ or name == "__version__"
    assert callable(trl_diffusion.elbo)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        trl_diffusion.nothing  # noqa: B018 - the access is the test


def test_importing_the_package_is_cheap_and_quiet():
    code = "import sys, trl_diffusion; print(sorted({'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == ("[]\n", "")


def test_estimators_need_torch_only():
    code = "import sys; from trl_diffusion import elbo, draw_masks; print({'transformers', 'trl'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"


LOADS = """
config = AutoConfig.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(config).__name__ == "LLaDAConfig" and type(model).__name__ == "LLaDAModelLM"
assert type(AutoModelForMaskedLM.from_pretrained(sys.argv[1])) is type(model)
assert not any(getattr(finder, "name", "").startswith("transformers") for finder in sys.meta_path)  # done, and gone
"""
TARGETS = """
import peft
adapted = peft.get_peft_model(model, peft.LoraConfig(r=2))
assert sum(hasattr(module, "lora_A") for module in adapted.modules()) == 14  # seven layers of two blocks, and no head
assert type(adapted.get_base_model().get_output_embeddings()).__name__ == "Linear"
"""
AUTO = "from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM\n"
ORDERS = {
    "package first": "import trl_diffusion\n" + AUTO,
    "transformers first, then PEFT": "import transformers\nimport trl_diffusion\n" + AUTO,
    "PEFT and auto classes first": "import peft\n" + AUTO + "import trl_diffusion\n",
    "in the middle of transformers": "import trl_diffusion, transformers.modeling_utils\n" + AUTO,
}


@pytest.mark.parametrize("order", ORDERS)
def test_importing_the_package_registers_what_it_saves(tmp_path, order):
    """In new interpreters: nothing of ours is imported until a checkpoint is met. PEFT knows then what to adapt."""
    make_model().save_pretrained(tmp_path)
    idle = "assert not {'trl_diffusion.models', 'trl_diffusion.models.llada'} & set(sys.modules)\n"
    code = "import sys\n" + ORDERS[order] + idle + LOADS + (TARGETS if "PEFT" in order else "")
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
