"""The tutorial as a notebook: executed in a real kernel, at a size for tests, and fit to be committed."""

from __future__ import annotations

import ast
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

_WHY = "needs a kernel and what the notebook shows with: pip install -r requirements-optional.lock"
nbclient = pytest.importorskip("nbclient", reason=_WHY)
nbformat = pytest.importorskip("nbformat", reason=_WHY)
pytest.importorskip("ipykernel", reason=_WHY)
pytest.importorskip("matplotlib", reason=_WHY)

from configs import notebook as notebook_config  # noqa: E402
from pgdist.config import fields_of  # noqa: E402
from tests.tiny_runs import ROOT, TOKENIZER  # noqa: E402
from tools import make_demo_data  # noqa: E402

NOTEBOOK = ROOT / "examples/finetune_paligemma.ipynb"
MOST_LINES = 70  # of code; the tutorial that it does again has about 300
STEPS, PREDICT_EVERY = 16, 8
SIZE = 56  # pixels


def read() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=nbformat.NO_CONVERT)


def code_cells(notebook: nbformat.NotebookNode) -> dict[str, nbformat.NotebookNode]:
    return {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}


def test_the_committed_notebook_is_valid_and_has_no_trace_of_a_run():
    content = NOTEBOOK.read_text()
    notebook = read()
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)  # from which on cells have ids
    assert content == nbformat.writes(notebook) + "\n"  # another editor's save is a small difference
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    for cell in code_cells(notebook).values():
        assert cell.outputs == [] and cell.execution_count is None, cell.id
        assert "execution" not in cell.metadata, cell.id
    assert not re.search(r"/(home|root|Users|tmp|content|work)/", content)


def test_its_code_is_as_short_as_promised():
    lines = [line.strip() for cell in code_cells(read()).values() for line in cell.source.splitlines()]
    assert len([line for line in lines if line and not line.startswith("#")]) <= MOST_LINES


def test_it_installs_extras_that_there_are():
    (line,) = [cell.source for cell in read().cells if "install" in cell.metadata.get("tags", ())]
    (names,) = re.findall(r'^%pip install -q "\.\.\[(.*)\]"$', line)
    for name in names.split(","):
        assert f'"{name}": [' in (ROOT / "setup.py").read_text()


def test_its_settings_are_those_of_the_config_of_that_name():
    cells, found = code_cells(read()), {}
    exec(cells["parameters"].source + "\n" + cells["config"].source, found)
    assert fields_of(found["config"]) == fields_of(notebook_config.get_config())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the kernel runs and all that it writes goes to, with its data and a kernel of this very Python."""
    scenes = make_demo_data.Settings(task="relations", seed=0, size=SIZE, max_objects=2)
    for split, count in (("train", 64), ("validation", 8), ("new", 1)):
        make_demo_data.write_split(tmp_path / "data", scenes, split=split, scenes=count)
    kernel = tmp_path / "jupyter/kernels/this"
    kernel.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(
        json.dumps({"argv": command, "display_name": "this", "language": "python"})
    )
    for variable in ("JUPYTER_PATH", "JUPYTER_CONFIG_PATH"):
        monkeypatch.delenv(variable, raising=False)
    for variable, place in {
        "HOME": "home",
        "IPYTHONDIR": "ipython",
        "JUPYTER_CONFIG_DIR": "jupyter_config",
        "JUPYTER_DATA_DIR": "jupyter",
        "JUPYTER_RUNTIME_DIR": "jupyter_runtime",
        "MPLCONFIGDIR": "matplotlib",
        "PGDIST_CACHE": "cache",
        "XDG_CACHE_HOME": "cache",
    }.items():
        (tmp_path / place).mkdir(exist_ok=True)
        monkeypatch.setenv(variable, str(tmp_path / place))
    return tmp_path


def execute(folder: Path, settings: dict[str, Any]) -> dict[str, nbformat.NotebookNode]:
    """The code cells with their outputs; the settings are assigned after those of the notebook, as papermill does."""
    notebook = read()
    notebook.cells = [cell for cell in notebook.cells if "install" not in cell.metadata.get("tags", ())]
    (at,) = [n for n, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ())]
    mine = "\n".join(f"{name} = {value!r}" for name, value in settings.items())
    known = {node.targets[0].id for node in ast.parse(notebook.cells[at].source).body}
    assert settings.keys() <= known
    notebook.cells.insert(at + 1, nbformat.v4.new_code_cell(mine, id="injected-parameters"))
    client = nbclient.NotebookClient(
        notebook,
        kernel_name="this",
        timeout=180,
        startup_timeout=60,
        resources={"metadata": {"path": str(folder)}},
    )
    two_devices = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    client.execute(env=os.environ | two_devices | {"PYTHONPATH": str(ROOT)})
    return code_cells(notebook)


def printed(cell: nbformat.NotebookNode) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def shown(cell: nbformat.NotebookNode, kind: str) -> str:
    """What the one output of this kind is."""
    (found,) = [output.data[kind] for output in cell.outputs if kind in output.get("data", ())]
    return found


def test_the_notebook_trains_shows_predicts_and_exports_on_two_devices(folder):
    before = set(NOTEBOOK.parent.rglob("*"))
    cells = execute(
        folder,
        {
            "preset": "tiny",
            "init": str(ROOT / "assets/tiny.npz"),
            "tokenizer": str(TOKENIZER),
            "train_data": "data/train.jsonl",
            "validation_data": "data/validation.jsonl",
            "new_images": [str(next((folder / "data/images/new").glob("*.png")))],
            "prompt": "describe en",
            "frozen_dtype": "bfloat16",
            "image_dtype": "float32",
            "max_tokens": 24,
            "steps": STEPS,
            "batch_size": 16,
            "learning_rate": 0.5,
            "predict_every": PREDICT_EVERY,
        },
    )

    assert printed(cells["devices"]).count("CpuDevice") == 2
    assert shown(cells["data"], "text/html").count('src="data:image/') == 4
    assert "llm/layers/attn/q_einsum/w" in printed(cells["parameter-table"])
    losses = re.findall(r"^step (\d+): validation loss ([\d.]+)", printed(cells["finetune"]), re.MULTILINE)
    assert [int(step) for step, _ in losses] == [0, 8, 16]
    first, middle, last = [float(loss) for _, loss in losses]
    assert last < middle < first / 2

    predictions = shown(cells["predictions"], "text/html")
    assert re.findall("<th(?: [^>]*)?>(.*?)</th>", predictions) == [
        "",
        "truth",
        "step 0",
        "step 8",
        "step 16",
    ]
    assert predictions.count('src="data:image/') == 4
    texts = re.findall("<td style[^>]*>(.*?)</td>", predictions, re.DOTALL)
    rows = [texts[start : start + 4] for start in range(0, 16, 4)]
    assert all(truth.startswith("the picture shows a ") for truth, *_ in rows)
    assert all(before != after for _, before, _, after in rows)  # the task is new to the model
    assert shown(cells["curves"], "image/png")

    answer = shown(cells["new-images"], "text/html")
    assert answer.count('src="data:image/') == 1
    assert re.search("<td style[^>]*>the picture shows ", answer)
    exported = folder / "runs/notebook/transformers"
    assert {"config.json", "model.safetensors"} <= {path.name for path in exported.iterdir()}
    assert set(NOTEBOOK.parent.rglob("*")) == before
