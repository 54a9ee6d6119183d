"""Write docs/cli.md from `--help`: python docs/make_cli.py"""

import os
import subprocess
import sys
from pathlib import Path

COMMANDS = (
    "",
    "export",
    "tune",
    "eval",
    "predict",
    "probe",
    "generate",
    "chat",
    "rate",
    "tasks",
    "inspect",
    "replay",
    "merge",
    "verify",
    "diff",
    "demo",
)
WIDTH = "110"


def text() -> str:
    """The whole page."""
    parts = ["# Commands\n\nWritten by `python docs/make_cli.py` from `--help`.\n"]
    for command in COMMANDS:
        arguments = [part for part in ("edgezo", command) if part]
        environment = {**os.environ, "COLUMNS": WIDTH, "TERMINAL_WIDTH": WIDTH, "NO_COLOR": "1"}
        shown = subprocess.run(
            [sys.executable, "-m", *arguments, "--help"], capture_output=True, text=True, check=True, env=environment
        ).stdout
        lines = "\n".join(line.rstrip() for line in shown.strip().splitlines())
        parts.append(f"## {' '.join(arguments)}\n\n```text\n{lines}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    (Path(__file__).parent / "cli.md").write_text(text(), encoding="utf-8")
