"""The `pgdist` command: `pgdist train ARGUMENTS` is `python -m launch.train ARGUMENTS`."""

from __future__ import annotations

import os
import runpy
import sys

from pgdist import __version__

COMMANDS = {
    "train": "fine-tune a model",
    "submit": "start a job here or on a cluster; status, logs and cancel",
    "predict": "answer prompts about images",
    "convert": "weights and checkpoints to a published npz or a transformers folder, and back",
    "env": "what a bug report needs: versions, devices, settings",
}

USAGE = "usage: pgdist COMMAND [flags]\n\nCommands:\n{}\n\n`pgdist COMMAND --help` tells more.".format(
    "\n".join(f"  {name:<9} {what}" for name, what in COMMANDS.items())
)


def main() -> None:
    """Runs the module that the first argument names, as `python -m` would."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE, file=sys.stdout if arguments else sys.stderr)
        sys.exit(0 if arguments else 2)
    if arguments[0] == "--version":
        print(f"pgdist {__version__}")
        sys.exit(0)
    command = arguments[0]
    if command not in COMMANDS:
        print(f"pgdist: error: no command {command!r}; there are: {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    sys.argv = [f"pgdist {command}", *arguments[1:]]
    sys.path.append(os.getcwd())  # as with `python -m`, config files may import what lies beside the user
    runpy.run_module(f"launch.{command}", run_name="__main__", alter_sys=True)
