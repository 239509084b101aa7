"""Writes options.md from the configurations: `python docs/options_page.py`. tests/test_docs.py holds the page to it."""

from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path

from trl_diffusion import DiffusionSFTConfig, DiffusionVRPOConfig, ELBOKTOConfig
from trl_diffusion.checks.options import REFUSED, RULES
from trl_diffusion.trainers.describe import changed_defaults, groups_of, help_text, parent_of, value_text

PAGE = Path(__file__).with_name("options.md")
CONFIGS = {"VRPO": DiffusionVRPOConfig, "ELBO-KTO": ELBOKTOConfig, "SFT": DiffusionSFTConfig}


TEXT = """\
# Options

`DiffusionVRPOConfig` has all options of `trl.DPOConfig`, `ELBOKTOConfig` has those of `trl.KTOConfig`, and
`DiffusionSFTConfig` those of `trl.SFTConfig`. Here is what they add, what they change and what they refuse. It is
written from the code, by `python docs/options_page.py`; `help(DiffusionVRPOConfig)` and `--help` of the scripts say the
same. [choosing-an-estimator.md](choosing-an-estimator.md) helps with the first four and with `couple_pairs`,
[paper-index.md](paper-index.md) has the options of each paper.

{ours}
## Other defaults than TRL's

{changed}
## Refused

Any value but TRL's default is refused when the configuration is made, before anything is loaded:

{refused}
`accelerate launch --dynamo_backend` is refused as `torch_compile` is, and so is a device without float64 (MPS), in
which masks are drawn. FSDP1 (`fsdp_version: 1`, accelerate's default where a file names none), Megatron, and tensor,
context and sequence parallelism are refused: they split what a score needs whole. `label_smoothing` is refused without
a loss that reads it. All loss types of `DPOConfig` and `KTOConfig` work, of `SFTConfig` `nll` alone, including
combinations such as `sigmoid` with `sft`.

Refused when a trainer is made: an adapter on the output head; one that changes the model before it has learnt anything
(PiSSA, OLoRA, FourierFT, `init_lora_weights=False`; one that comes with the model is copied and may do so); trained
weights that the reference shares with the policy (biases of the base model); virtual tokens (prompt learning); several
active adapters, a merged one, or one that transformers put in (`load_adapter`); `compute_metrics`, as there are no
logits of a text; a model with causal attention, one that was compiled, and one whose weights a `device_map` has left to
the CPU or a disk; a dataset with reference scores of another run; and a TRL outside the tested range.

## Values

What else is refused, and with it every number that is not finite. TRL and transformers meet most of it when the model
is loaded and the reference scored, or not at all.

{values}"""


def page() -> str:
    """The text of the page."""
    values = ((f"`{name}`", rule.words) for name, rule in RULES.items())
    return TEXT.format(
        ours="\n".join(_ours()),
        changed=_table(("option", "configuration", "default", "TRL's"), _changed()),
        refused=_table(("option", "of", "why"), _refused()),
        values=_table(("option", "must be"), values),
    )


def _ours() -> Iterator[str]:
    groups = {name: groups_of(config) for name, config in CONFIGS.items()}
    for group in {group: None for found in groups.values() for group in found}:
        having = [name for name, found in groups.items() if group in found]
        yield f"## {group[0].upper()}{group[1:]}" + ("" if len(having) == len(CONFIGS) else f" ({', '.join(having)})")
        yield ""
        rows = []
        for i, field in enumerate(groups[having[0]][group]):
            defaults = {name: value_text(groups[name][group][i].default) for name in having}
            same = len(set(defaults.values())) == 1
            written = (f"`{value}`" + ("" if same else f" for {name}") for name, value in defaults.items())
            rows.append((f"`{field.name}`", ", ".join(dict.fromkeys(written)), help_text(field)))
        yield _table(("option", "default", "what it does"), rows)


def _changed() -> Iterator[tuple[str, ...]]:
    for config in CONFIGS.values():
        for name, ours, theirs in changed_defaults(config):
            yield f"`{name}`", f"`{config.__name__}`", f"`{ours}`", f"`{theirs}`"


def _refused() -> Iterator[tuple[str, ...]]:
    for option, why in REFUSED.items():
        having = [parent_of(c) for c in CONFIGS.values() if option in {field.name for field in fields(c)}]
        names = ", ".join(f"`{config.__name__}`" for config in having)
        yield f"`{option}`", "all" if len(having) == len(CONFIGS) else names, why


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    cells = (" | ".join(cell.replace("|", chr(92) + "|") for cell in line) for line in lines)
    return "".join(f"| {line} |\n" for line in cells)


if __name__ == "__main__":
    PAGE.write_text(page())
