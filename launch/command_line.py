"""Parses a command line, and says in one line what is wrong with it.

Parsing is absl's and ml_collections'. When they refuse, what they raise is about their own insides, so the
command line is looked at once more: the config file is loaded anew, to name the file and the line that
failed, and every `--config.a.b=value` is held against the fields that the config really has.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import re
import traceback
import types
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from pgdist.errors import ConfigError, UserError

# By absl's names for the types of flags, and Python's for the types of fields.
_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "tuple": "a tuple",
    "multi tuple": "a tuple in quotes, such as \"(1, 2)\" or \"(('a', 1.0), ('b', 0.0))\"",
}

# How absl's message begins when a value cannot be converted; others (bounds, choices) are clear as they are.
_NOT_CONVERTIBLE = re.compile(
    r"flag --([^=\s]+)=.*: (invalid literal|could not convert|\('Non-boolean|Error while)", re.DOTALL
)

# What ConfigDict says of a field that it does not have, and of a value that a field cannot have.
_NO_SUCH_FIELD = re.compile(r'Key "(\w+)" does not exist and cannot be added')
_DID_YOU_MEAN = re.compile(r'Did you mean "(\w+)" instead')
_WRONG_TYPE = re.compile(
    r"Could not override field '(\w+)'.*?\. (.*) is of original type <class '(\w+)'> "
    r"and cannot be casted to type <class '(\w+)'>",
    re.DOTALL,
)


def parse(flag_values: flags.FlagValues, argv: Sequence[str]) -> list[str]:
    """Sets the flags from `argv`, the program's name first; returns it without them.

    Raises ConfigError for whatever is wrong with a flag, a config field or the config file.
    """
    try:
        remaining = flag_values(argv)
    except (Exception, SystemExit) as error:  # a config file may raise anything
        raise ConfigError(_explain(flag_values, argv, error)) from error
    for flag in config_flags_of(flag_values):
        # A file that cannot be read is no error to ml_collections until a field is asked for.
        if flag.present and not isinstance(flag.value, ConfigDict):
            load_config(flag.config_filename)
    return remaining


def config_flags_of(flag_values: flags.FlagValues) -> list[flags.Flag]:
    """The flags that take a config file."""
    return [flag_values[name] for name in flag_values if flag_values[name].flag_type() == "config object"]


def own_modules(flag_values: flags.FlagValues, program: str) -> list[str]:
    """Our modules that define flags, the command's own first.

    program: sys.argv[0], which is what absl calls the module that runs as `__main__`.
    """
    modules = list(flag_values.flags_by_module_dict())
    return [m for m in modules if m == program] + [m for m in modules if m.split(".")[0] == "launch"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GivenFlag:
    """One flag of a command line as it was typed: `--name=value`, `--name value` or `--name` (value None)."""

    name: str
    value: str | None


def given_flags(arguments: Sequence[str]) -> list[GivenFlag]:
    """The flags among `arguments` (without the program's name), in their order."""
    given = []
    for argument, following in itertools.zip_longest(arguments, arguments[1:]):
        if argument == "--":
            break
        if argument.startswith("-"):
            name, equals, value = argument.lstrip("-").partition("=")
            if not equals:
                value = None if following is None or following.startswith("-") else following
            given.append(GivenFlag(name=name, value=value))
    return given


def load_config(argument: str) -> ConfigDict:
    """What `--config=argument` stands for: the result of `get_config()` in that file.

    argument: a path, and after a colon what `get_config` is called with.  Raises ConfigError with the file
    and, where there is one, the line of the failure.
    """
    path, colon, parameter = argument.partition(":")
    try:
        source = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(f"cannot read the config file {path}: {reason}") from error
    module = types.ModuleType("config")
    module.__file__ = path
    try:
        exec(compile(source, path, "exec"), module.__dict__)
        if not callable(getattr(module, "get_config", None)):
            raise ConfigError(f"{path} defines no function get_config(); that is what makes it a config file")
        config = module.get_config(*([parameter] if colon else []))
    except SyntaxError as error:
        raise ConfigError(f"{error.filename} line {error.lineno}: {error.msg}") from error
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == path]
        if isinstance(error, ConfigError) and not lines:
            raise
        where = f"{path} line {lines[-1]}" if lines else path
        raise ConfigError(f"{where}: {_describe(error)}") from error
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"{path}: get_config() returns {type(config).__name__}, expected a ConfigDict")
    return config


def flatten(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """All fields by their dotted names: {"steps": 64, "data.train": "..."}."""
    fields = {}
    for name, value in config.items():
        is_group = isinstance(value, ConfigDict)
        fields |= flatten(value, f"{prefix}{name}.") if is_group else {prefix + name: value}
    return fields


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that was probably meant: a field of that name in another group, else one spelt alike."""
    known = list(known)
    same_leaf = [other for other in known if other.split(".")[-1] == name.split(".")[-1]]
    if same_leaf:
        return max(same_leaf, key=lambda other: difflib.SequenceMatcher(None, name, other).ratio())
    return next(iter(difflib.get_close_matches(name, known, n=1)), None)


def _describe(error: BaseException) -> str:
    """What a config file has raised, in one line where it is ConfigDict's: those print the whole config."""
    if isinstance(error, UserError):
        return str(error)
    if match := _NO_SUCH_FIELD.search(str(error)):
        near = _DID_YOU_MEAN.search(str(error))
        return f"the config has no field {match[1]!r}" + (f"; did you mean {near[1]!r}?" if near else "")
    if match := _WRONG_TYPE.search(str(error)):
        field, value, found, expected = match.groups()
        return f"field {field!r}: expected {_EXPECTED.get(expected, expected)}, found {value} ({found})"
    return f"{type(error).__name__}: {error}"


def _explain(flag_values: flags.FlagValues, argv: Sequence[str], error: BaseException) -> str:
    """What to tell the user about `error`, which parsing `argv` has raised."""
    if isinstance(error, flags.CantOpenFlagFileError):
        return str(error)
    given = given_flags(flag_values.read_flags_from_files(list(argv[1:]), force_gnu=False))
    for flag in config_flags_of(flag_values):
        if message := _wrong_field(flag.name, given):
            return message
    if isinstance(error, flags.UnrecognizedFlagError):
        return _unknown_flag(flag_values, error.flagname, argv[0])
    if missing := re.findall(r"Flag (--\S+) must have a value other than None", str(error)):
        return f"{' and '.join(missing)} must be given"
    if match := _NOT_CONVERTIBLE.match(str(error)):
        name = match[1]
        kind = flag_values[name].flag_type()
        found = [flag.value for flag in given if flag.name == name][-1]
        return f"--{name}: expected {_EXPECTED.get(kind, kind)}, found {found!r}"
    return str(error).removeprefix("flag ")


def _wrong_field(config_flag: str, given: Sequence[GivenFlag]) -> str:
    """What is wrong with the fields that are set, "" if nothing.  Raises ConfigError for a broken file."""
    names = [flag.name for flag in given]
    overrides = [name for name in names if name.removeprefix("no").startswith(config_flag + ".")]
    if config_flag not in names:
        return f"--{overrides[0]} is given, but no --{config_flag}=FILE" if overrides else ""
    if overrides and names.index(overrides[0]) < names.index(config_flag):
        return f"--{overrides[0]} stands before --{config_flag}=FILE; give it after the file that it changes"
    file = given[names.index(config_flag)].value
    if file is None:
        return f"--{config_flag} needs a value: the path of a config file"
    fields = flatten(load_config(file))
    for override in overrides:
        name = override.removeprefix("no").removeprefix(config_flag + ".")
        if name in fields:
            continue
        if group := [field for field in fields if field.startswith(name + ".")]:
            return f"--{override} is a group of fields; set one of them, such as --{config_flag}.{group[0]}"
        near = nearest(name, fields)
        advice = f"did you mean --{config_flag}.{near}?" if near else "--help after it lists the fields"
        return f"--{override}: {file} has no such field; {advice}"
    return ""


def _unknown_flag(flag_values: flags.FlagValues, name: str, program: str) -> str:
    by_module = flag_values.flags_by_module_dict()
    known = [flag.name for module in own_modules(flag_values, program) for flag in by_module[module]]
    near = nearest(name, known)
    return f"unknown flag --{name}; " + (f"did you mean --{near}?" if near else "--help lists the flags")
