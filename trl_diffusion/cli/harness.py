"""
The command of lm-evaluation-harness, which knows its own models only, told of ours first.

Its options are its own, and so is its output.
"""

import sys
from difflib import get_close_matches

INTRODUCTION = """\
Runs benchmarks of lm-evaluation-harness: its command `lm_eval`, with its options, and our model as the default.

For example:

    trl-diffusion lm-eval --model_args pretrained=GSAI-ML/LLaDA-8B-Instruct,max_new_tokens=256,block_length=8 \\
        --tasks gsm8k --num_fewshot 5 --apply_chat_template --batch_size 8 --output_path results

`trl-diffusion lm-eval run --help` lists its options, `trl-diffusion lm-eval ls tasks` its tasks; docs/benchmarks.md has
what `--model_args` can hold."""
_COMMANDS = ("run", "ls", "validate")
_NOT_FOUND = "Tasks not found: "


def harness(options: list[str]) -> int:
    """Run it; returns the exit code."""
    if not options:
        print(INTRODUCTION)
        return 0
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        message = f"lm-evaluation-harness cannot be imported ({error}): pip install 'trl_diffusion[eval]'."
        print(f"trl-diffusion lm-eval: error: {message}", file=sys.stderr)
        return 1
    from .parting import part

    given = sys.argv
    sys.argv = ["lm_eval", *_with_our_model(options)]
    try:
        cli_evaluate()
        part()
    except (ValueError, OSError) as error:  # of a user's values, which say what to do
        print(f"trl-diffusion lm-eval: error: {_with_the_nearest(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ntrl-diffusion lm-eval: interrupted.", file=sys.stderr)
        return 130
    finally:
        sys.argv = given
    return 0


def _with_our_model(options: list[str]) -> list[str]:
    command, rest = (options[0], options[1:]) if options[0] in _COMMANDS else ("run", options)
    is_named = any(option.split("=")[0] in ("--model", "-M", "--config", "-C") for option in rest)
    return [command, *rest] if command != "run" or is_named else [command, "--model", "trl_diffusion", *rest]


def _with_the_nearest(message: str) -> str:
    """The harness says which tasks it does not find, and not which it has."""
    if not message.startswith(_NOT_FOUND):
        return message
    from lm_eval.tasks import TaskManager

    known = TaskManager().all_tasks
    missing = message.removeprefix(_NOT_FOUND).split(", ")
    nearest = [near for task in missing for near in get_close_matches(task, known, n=1)]
    hint = f"Did you mean {', '.join(f'`{name}`' for name in nearest)}? " if nearest else ""
    return f"{message}. {hint}`trl-diffusion lm-eval ls tasks` lists all; `--include_path FOLDER` adds your own."
