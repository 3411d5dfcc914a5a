"""What is told to the backend by kind of device, and that a user's word comes first."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pgdist import backend_flags
from pgdist.backend_flags import Setting, apply, describe, find_kind

ROOT = Path(__file__).parents[1]
LATENCY = "--xla_gpu_enable_latency_hiding_scheduler"
FRACTION = "XLA_CLIENT_MEM_FRACTION"


def python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {
        name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
    }
    return subprocess.run(
        [sys.executable, "-c", code],
        env=kept | {"PYTHONPATH": str(ROOT)} | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )


def put(root: Path, *files: tuple[str, str]) -> Path:
    for name, text in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.fixture(autouse=True)
def nothing_recorded(monkeypatch):
    monkeypatch.setattr(backend_flags, "_kind", None)
    monkeypatch.setattr(backend_flags, "_effects", ())


@pytest.mark.parametrize(
    ("files", "variables", "kind"),
    [
        ([], {}, "cpu"),
        ([("dev/nvidia0", "")], {}, "gpu"),
        ([("dev/nvidia0", "")], {"JAX_PLATFORMS": "cpu"}, "cpu"),
        ([("dev/nvidia0", "")], {"CUDA_VISIBLE_DEVICES": ""}, "cpu"),
        ([("dev/nvidia0", "")], {"CUDA_VISIBLE_DEVICES": "1,2"}, "gpu"),
        ([], {"JAX_PLATFORMS": "cuda,cpu"}, "gpu"),
        ([("sys/bus/pci/devices/1/vendor", "0x1ae0\n"), ("sys/bus/pci/devices/1/device", "0x0063\n")], {}, "tpu v5e"),
        ([("sys/bus/pci/devices/1/vendor", "0x1ae0\n"), ("sys/bus/pci/devices/1/device", "0x006f\n")], {}, "tpu v6e"),
        ([("sys/bus/pci/devices/1/vendor", "0x1ae0\n"), ("sys/bus/pci/devices/1/device", "0x0042\n")], {}, "cpu"),
        ([("sys/bus/pci/devices/1/vendor", "0x8086\n"), ("sys/bus/pci/devices/1/device", "0x0063\n")], {}, "cpu"),
    ],
)  # fmt: skip
def test_the_kind_of_device_is_seen_without_jax(tmp_path, files, variables, kind):
    assert find_kind(variables, root=put(tmp_path, *files)) == kind


@pytest.mark.parametrize("kind", backend_flags.TABLE)
def test_every_setting_of_a_kind_is_made_and_has_a_reason_and_a_source(kind, tmp_path):
    knows_all = "\n".join(setting.flag for settings in backend_flags.TABLE.values() for setting in settings)
    environ = {"TPU_LIBRARY_PATH": str(put(tmp_path, ("libtpu.so", knows_all)) / "libtpu.so")}
    effects = apply(kind, environ)
    assert [effect.set_by for effect in effects] == ["pgdist"] * len(backend_flags.TABLE[kind])
    for setting in backend_flags.TABLE[kind]:
        assert setting.reason and setting.source
        expected = f"{setting.flag}={setting.value}" if setting.flag else setting.value
        assert expected in environ[setting.variable].split()


@pytest.mark.parametrize("kind", backend_flags.TABLE)
def test_the_installed_compiler_takes_every_flag_of_a_kind(kind):
    code = (
        f"from pgdist import backend_flags; backend_flags.apply({kind!r})\n"
        "import jax; print(jax.jit(lambda x: x + 1)(1))"
    )
    done = python(code, JAX_PLATFORMS="cpu")
    assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr


def test_a_flag_that_the_user_has_set_is_kept_beside_ours():
    environ = {"XLA_FLAGS": f"--xla_dump_to=/tmp/x {LATENCY}=false"}
    effects = {effect.name: effect for effect in apply("gpu", environ)}
    assert environ["XLA_FLAGS"] == f"--xla_dump_to=/tmp/x {LATENCY}=false"
    assert (effects[LATENCY].set_by, effects[LATENCY].value) == ("user", "false")
    assert effects["--xla_dump_to"].set_by == "user"

    environ = {"XLA_FLAGS": "--xla_dump_to=/tmp/x"}
    apply("gpu", environ)
    assert environ["XLA_FLAGS"] == f"--xla_dump_to=/tmp/x {LATENCY}=true"


@pytest.mark.parametrize(
    "name", [FRACTION, "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE"]
)
def test_a_user_who_says_how_much_memory_jax_takes_is_not_contradicted(name):
    environ = {name: "0.4"}
    effects = {effect.name: effect.set_by for effect in apply("gpu", environ)}
    assert effects[name] == "user"
    assert environ[name] == "0.4" and (FRACTION in environ) == (name == FRACTION)


def test_a_file_of_flags_is_left_to_its_user():
    environ = {"XLA_FLAGS": "/home/me/flags.txt"}
    effects = {effect.name: effect for effect in apply("cpu", environ)}
    assert environ == {"XLA_FLAGS": "/home/me/flags.txt"}
    flags = [effect for name, effect in effects.items() if name.startswith("--xla_cpu")]
    assert flags and all(flag.set_by == "nobody" and "names a file of flags" in flag.reason for flag in flags)


def test_a_flag_that_the_installed_compiler_does_not_know_is_left_out(monkeypatch):
    retired = Setting(
        variable="XLA_FLAGS", flag="--xla_gpu_retired", value="1", reason="fast", source="a blog"
    )
    monkeypatch.setattr(backend_flags, "TABLE", {"gpu": (retired,)})
    environ: dict[str, str] = {}
    (effect,) = apply("gpu", environ)
    assert environ == {} and effect.set_by == "nobody" and "not known to libjax_common.so" in effect.reason


def test_what_was_done_is_described_for_a_bug_report():
    apply("gpu", {"XLA_FLAGS": f"{LATENCY}=false"})
    found = describe()
    assert found["kind"] == "gpu"
    assert found[LATENCY] == {"value": "false", "set_by": "user", "reason": "was in XLA_FLAGS"}
    assert found[FRACTION]["set_by"] == "pgdist" and "70 of 80 GB" in found[FRACTION]["reason"]


def test_nothing_of_jax_is_imported():
    code = "import sys; from pgdist import backend_flags; backend_flags.apply('cpu'); print('jax' in sys.modules)"
    assert python(code).stdout == "False\n"


def test_a_command_tells_its_flags_before_jax_reads_them():
    code = """
import os
from absl import flags
from launch import membership
flags.FLAGS(["x", "--fake_devices=2"])
membership.join_job()
import jax
print(jax.device_count(), os.environ["XLA_FLAGS"])
"""
    done = python(code, XLA_FLAGS="--xla_cpu_enable_fast_math=false")
    ours = " ".join(f"{setting.flag}={setting.value}" for setting in backend_flags.TABLE["cpu"])
    assert done.stdout == f"2 --xla_cpu_enable_fast_math=false {ours}\n", done.stderr
