"""`--help` that can be read: a command's flags and its config's fields, not the hundred of the libraries."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Sequence

from absl import flags

from launch import command_line

_HELP = ("-h", "--help", "-help", "-?", "--?", "--helpshort", "--helpfull")
_VALUES = {"int": "N", "float": "X", "config object": "FILE.py", "comma separated list of strings": "A,B,..."}


def is_wanted(argv: Sequence[str]) -> bool:
    """Whether a help flag stands among the arguments."""
    arguments = list(argv[1:])
    if "--" in arguments:
        arguments = arguments[: arguments.index("--")]
    return any(argument in _HELP for argument in arguments)


def render(
    flag_values: flags.FlagValues, argv: Sequence[str], *, name: str, usage: str, positional: str = ""
) -> str:
    """The help of a command; with `--config=FILE` that file's fields too, with `--helpfull` every flag.

    name, usage, positional: as in `launch.entry.run`.
    """
    if "--helpfull" in argv:
        return flag_values.get_help()
    arguments = f"{name} [flags] {positional}".strip()
    parts = [f"usage: python -m launch.{arguments}      (or: pgdist {arguments})", usage.strip()]
    by_module = flag_values.flags_by_module_dict()
    for module in command_line.own_modules(flag_values, argv[0]):
        title = "Flags" if module == argv[0] else _first_line(module)
        parts.append(f"{title}:\n" + "\n".join(_flag(flag) for flag in by_module[module]))
    parts += [_config_fields(flag.name, argv) for flag in command_line.config_flags_of(flag_values)]
    parts.append("--verbosity=1 logs more, --verbosity=-1 warnings only; --helpfull lists all flags.")
    return "\n\n".join(parts)


def _flag(flag: flags.Flag) -> str:
    kind = flag.flag_type()
    choices = "|".join(getattr(flag.parser, "enum_values", ()))
    left = f"--[no]{flag.name}" if kind == "bool" else f"--{flag.name}={choices or _VALUES.get(kind, 'TEXT')}"
    if flag.short_name:
        left = f"-{flag.short_name}, {left}"
    default = "" if flag.default in (None, "", False, []) else f" (default: {flag.default})"
    # absl appends advice on repeating a flag, which here may take several values at once.
    text = flag.help.removeprefix(f"<{choices}>: ").split(";\n    repeat this option")[0]
    return _row(left, text + default, column=26)


def _config_fields(flag_name: str, argv: Sequence[str]) -> str:
    files = [flag.value for flag in command_line.given_flags(argv[1:]) if flag.name == flag_name]
    if not files or files[0] is None:
        return f"--{flag_name}=FILE.py --help lists that file's fields; --{flag_name}.NAME=VALUE sets one."
    fields = command_line.flatten(command_line.load_config(files[0]))
    names = [f"--{flag_name}.{name}" for name in fields]
    column = min(max(map(len, names), default=0) + 4, 45)
    rows = map(lambda name, value: _row(name, f"= {value!r}", column=column), names, fields.values())
    return f"Fields of {files[0]}:\n" + "\n".join(rows)


def _row(left: str, right: str, *, column: int) -> str:
    """`left`, and from `column` on the wrapped `right`; below `left` where that is too long."""
    width = min(shutil.get_terminal_size().columns, 110)
    lines = textwrap.wrap(right, max(width - column, 30))
    left = "  " + left
    first = left.ljust(column) + lines.pop(0) if lines and len(left) < column else left
    return "\n".join([first] + [" " * column + line for line in lines])


def _first_line(module: str) -> str:
    documentation = sys.modules[module].__doc__ or module
    return documentation.strip().splitlines()[0].rstrip(".:")
