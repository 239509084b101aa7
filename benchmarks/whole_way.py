"""
Runs every command of docs/first-run.md as it stands there, and says how long each took and how long all: by the clock,
and in CPU time, which other work on the machine does not lengthen as much.

    python benchmarks/whole_way.py

Each runs in a shell of its own at the root of the repository, with the programs of this interpreter's environment.
"""

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "first-run.md"


def commands() -> list[str]:
    """Those of the page, each on one line."""
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def named(command: str) -> str:
    """What a command is called."""
    words = [word for word in shlex.split(command) if "=" not in word]
    return words[1]


def main() -> int:
    programs = str(Path(sys.executable).parent)
    environment = os.environ | {
        "PATH": programs + os.pathsep + os.environ["PATH"],
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    times: list[tuple[str, float, float]] = []
    for command in commands():
        print(f"$ {' '.join(command.split())}", flush=True)
        start, before = time.monotonic(), os.times()
        subprocess.run(command, shell=True, cwd=ROOT, env=environment, check=True)
        after = os.times()
        cpu = after.children_user - before.children_user + after.children_system - before.children_system
        times.append((named(command), time.monotonic() - start, cpu))
    times.append(("all", sum(wall for _, wall, _ in times), sum(cpu for _, _, cpu in times)))
    print("\n".join(f"{name:<24}{wall:7.1f} s {cpu:7.1f} s of CPU" for name, wall, cpu in times))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
