"""
The command `trl-diffusion`: the name of what is to be done, and its options.

Nothing is imported before it is known what is asked for, and notices that no user can do anything about are left out.
"""

import sys
from difflib import get_close_matches
from importlib import import_module

from .quiet import quiet_start

# By name: module, the command in it, and what it does in a few words
COMMANDS = {
    "sft": ("training", "SFT", "fine-tune on completions, conversations or texts"),
    "sample-pairs": ("answering", "SAMPLE_PAIRS", "make preferences from the model's own answers"),
    "diagnose": ("judging", "DIAGNOSE", "how noisy is the preference score, and which estimator to take"),
    "vrpo": ("training", "VRPO", "align with pairs of preferred and rejected responses"),
    "iterative-vrpo": ("rounds", "ITERATIVE_VRPO", "sample answers, score them, align with pairs of them, and repeat"),
    "elbo-kto": ("training", "ELBO_KTO", "align with single responses, marked as desirable or not"),
    "score": ("judging", "SCORE", "likelihood and perplexity of texts, with their error"),
    "generate": ("answering", "GENERATE", "answer prompts with the diffusion sampler"),
    "merge": ("merging", "MERGE", "merge an adapter into its base model"),
}
_HARNESS = ("lm-eval", "benchmarks of lm-evaluation-harness, with its own options")


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    name, *options = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print(overview())
        return 0
    if name not in (*COMMANDS, _HARNESS[0]):
        nearest = get_close_matches(name, [*COMMANDS, _HARNESS[0]], n=1)
        hint = f"Did you mean `{nearest[0]}`?" if nearest else f"The commands are {', '.join(COMMANDS)}, {_HARNESS[0]}."
        print(f"trl-diffusion: error: `{name}` is not a command. {hint}", file=sys.stderr)
        return 2
    quiet_start()
    if name == _HARNESS[0]:
        from .harness import harness

        return harness(options)
    from .parser import OF_THE_LAUNCH

    module, attribute, _ = COMMANDS[name]
    command = getattr(import_module(f".{module}", __package__), attribute)
    if not options:
        print(command.introduction())
        return 0
    try:
        if any(option.split("=")[0] in OF_THE_LAUNCH for option in options):
            from .launch import launch

            return launch(command, options)
        command.run(*command.parser().parse_args_and_config(options))
    except (ValueError, OSError) as error:  # of a user's values, which say what to do
        print(f"trl-diffusion {name}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\ntrl-diffusion {name}: interrupted.", file=sys.stderr)
        return 130
    return 0


def overview() -> str:
    """What there is."""
    named = [*((name, about) for name, (_, _, about) in COMMANDS.items()), _HARNESS]
    lines = [f"    {name:<16}{about}" for name, about in named]
    head = "Masked diffusion language models, from a dataset to a judged model."
    tail = (
        "A command without options explains itself; with `--help` it lists them. They may stand in a YAML file\n"
        "(`--config FILE.yaml`). `--accelerate_config NAME` runs a command on several devices."
    )
    return "\n".join([head, "", "usage: trl-diffusion COMMAND [options]", "", *lines, "", tail])


if __name__ == "__main__":
    raise SystemExit(main())
