"""What the commands say about a wrong flag, config field or config file, and what --help prints."""

import textwrap

import pytest
from absl import flags
from ml_collections import config_flags

from launch import command_line, help_text
from pgdist.errors import ConfigError

CONFIG = """
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

def get_config(size="small"):
    return ConfigDict(dict(
        steps=64, learning_rate=0.1, lowercase=False, rules=(("a", 1.0), ("b", 0.0)),
        data=dict(train="", workers=0, prefix=placeholder(str)), model=dict(size=size),
    ))
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def parse(monkeypatch):
    """Parses arguments as a command with a config and some flags of its own would."""

    def parse(*arguments):
        argv = ["train.py", *map(str, arguments)]
        monkeypatch.setattr("sys.argv", argv)  # where ml_collections looks for the fields that are set
        values = _define_flags()
        return values, command_line.parse(values, argv)

    return parse


def _define_flags():
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "The configuration.", flag_values=values)
    own = {"flag_values": values, "module_name": "train.py"}
    flags.DEFINE_flag(flags.Flag(flags.ArgumentParser(), None, "workdir", None, "Where to write."), **own)
    parser = flags.IntegerParser(lower_bound=0)
    flags.DEFINE_flag(flags.Flag(parser, flags.ArgumentSerializer(), "fake_devices", 0, "Simulated."), **own)
    return values


def test_fields_of_every_type_can_be_set(parse, config_file):
    values, rest = parse(
        f"--config={config_file}:large", "--config.steps=3", "--config.learning_rate", "1e-3",
        "--config.lowercase", "--config.rules=(('c', 0.5),)", "--config.data.prefix=caption en", "image.png",
    )  # fmt: skip
    config = values.config
    assert (config.steps, config.learning_rate, config.lowercase) == (3, 1e-3, True)
    assert (config.rules, config.data.prefix, config.model.size) == ((("c", 0.5),), "caption en", "large")
    assert rest == ["train.py", "image.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--config={c} --config.stpes=1",
            "--config.stpes: {c} has no such field; did you mean --config.steps",
        ),
        ("--config={c} --config.trian.steps=1", "{c} has no such field; did you mean --config.steps?"),
        ("--config={c} --config.data.wokers=1", "did you mean --config.data.workers?"),
        ("--config={c} --config.workers=1", "did you mean --config.data.workers?"),
        ("--config={c} --config.data.train.x=1", "did you mean --config.data.train?"),
        ("--config={c} --config.steps=3 --config.xyzzy=1", "--config.xyzzy: {c} has no such field"),
        ("--config={c} --config.steps=1.5", "--config.steps: expected a whole number, found '1.5'"),
        ("--config={c} --config.learning_rate=big", "--config.learning_rate: expected a number, found 'big'"),
        (
            "--config={c} --config.lowercase=maybe",
            "--config.lowercase: expected true or false, found",
        ),
        ("--config={c} --config.rules=('a',", "--config.rules: expected a tuple in quotes"),
        (
            "--config={c} --config.data=3",
            "--config.data is a group of fields; set one of them",
        ),
        ("--config={c} --config.steps", "Missing value for flag --config.steps"),
        ("--config.steps=3 --config={c}", "--config.steps stands before --config=FILE"),
        ("--config.steps=3", "--config.steps is given, but no --config=FILE"),
        ("--config", "--config needs a value"),
        ("--config={c}.missing", "cannot read the config file {c}.missing: No such file or directory"),
        ("--config={folder}", "cannot read the config file {folder}: Is a directory"),
        ("--wrokdir=x", "unknown flag --wrokdir; did you mean --workdir?"),
        ("--xyzzy=x", "unknown flag --xyzzy; --help lists the flags"),
        ("--fake_devices=two", "--fake_devices: expected a whole number, found 'two'"),
        ("--fake_devices=-1", "--fake_devices=-1: -1 is not a non-negative integer"),
    ],
)
def test_a_wrong_argument_is_named_in_one_line(parse, config_file, arguments, message):
    names = {"c": config_file, "folder": config_file.parent}
    with pytest.raises(ConfigError) as raised:
        parse(*arguments.format(**names).split())
    assert message.format(**names) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def get_config(:\n", "{c} line 1: invalid syntax"),
        (
            "import nothing_of_this_name\n",
            "{c} line 1: ModuleNotFoundError: No module named",
        ),
        ("def get_config():\n    return 1 / 0\n", "{c} line 2: ZeroDivisionError: division by zero"),
        ("def get_config():\n    open('/nowhere')\n", "{c} line 2: FileNotFoundError"),
        ("def get_config():\n    raise TypeError('no')\n", "{c} line 2: TypeError: no"),
        ("import sys\nsys.exit(0)\n", "{c} line 2: SystemExit: 0"),
        (
            "from pgdist.errors import DataError\ndef get_config():\n    raise DataError('no such size')\n",
            "{c} line 3: no such size",
        ),
        ("config = 3\n", "{c} defines no function get_config()"),
        (
            "def get_config():\n    return {'steps': 1}\n",
            "{c}: get_config() returns dict, expected",
        ),
        ("def get_config():\n    pass\n", "{c}: get_config() returns NoneType, expected a ConfigDict"),
        ("\xff", "cannot read the config file {c}: it is not UTF-8 text"),
    ],
)
def test_a_broken_config_file_is_named_with_its_line(parse, config_file, source, message):
    config_file.write_text(source, encoding="latin-1")
    with pytest.raises(ConfigError) as raised:
        parse(f"--config={config_file}")
    assert message.format(c=config_file) in str(raised.value)


def test_a_config_that_takes_no_argument_is_not_given_one(parse, config_file):
    config_file.write_text("def get_config():\n    pass\n")
    with pytest.raises(ConfigError, match="takes 0 positional arguments"):
        parse(f"--config={config_file}:large")


def test_required_flags_are_named_together(parse, monkeypatch):
    define = _define_flags

    def define_required():
        values = define()
        flags.mark_flags_as_required(["workdir", "config"], flag_values=values)
        return values

    monkeypatch.setattr(f"{__name__}._define_flags", define_required)
    with pytest.raises(ConfigError, match="^--(workdir and --config|config and --workdir) must be given$"):
        parse()


def test_fields_in_a_flagfile_are_checked_too(parse, config_file, tmp_path):
    flagfile = tmp_path / "flags.txt"
    flagfile.write_text(f"--config={config_file}\n--config.stpes=3\n")
    with pytest.raises(ConfigError, match="did you mean --config.steps"):
        parse(f"--flagfile={flagfile}")


def test_help_shows_own_flags_and_the_fields_of_the_config(config_file):
    values = _define_flags()
    argv = ["train.py", "--help", f"--config={config_file}"]
    assert help_text.is_wanted(argv)
    text = help_text.render(values, argv, name="train", usage="Train.", positional="[IMAGE...]")
    assert text.startswith("usage: python -m launch.train [flags] [IMAGE...]")
    assert "--fake_devices=N" in text
    assert "--config.data.workers" in text
    assert all(len(line) <= 110 for line in text.splitlines())


def test_help_is_not_wanted_after_a_double_dash():
    assert not help_text.is_wanted(["predict.py", "--", "--help"])


def test_given_flags_reads_both_ways_to_give_a_value():
    given = command_line.given_flags(textwrap.dedent("-a=1 --b 2 --c --d= e -- --f").split())
    assert [(flag.name, flag.value) for flag in given] == [("a", "1"), ("b", "2"), ("c", None), ("d", "")]
