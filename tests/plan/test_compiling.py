"""Compiling what a config runs for devices that are here, and for a slice of TPUs that is not."""

from __future__ import annotations

import importlib.util
import json

import jax
import pytest
from ml_collections import ConfigDict

from pgdist import plan
from pgdist.config import default_config
from pgdist.errors import ConfigError
from pgdist.models.presets import preset

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the TPU's compiler: install pgdist[plan]"
)


def tiny(**fields: object) -> ConfigDict:
    config = default_config()
    config.update_from_flattened_dict(
        {"model.preset": "tiny", "batch_size": 16, "data.text_length": 16, **fields}
    )
    return config


@pytest.fixture(scope="module")
def on_cpu() -> plan.CompiledStep:
    return plan.compile_train_step(tiny(**{"mesh.data": 2}))


def test_a_step_for_the_devices_here_tells_its_memory_and_no_time(on_cpu):
    assert (on_cpu.compiled.devices, on_cpu.compiled.mesh) == ("8 x cpu", {"data": 2, "fsdp": 4})
    assert 0 < on_cpu.compiled.arguments < on_cpu.compiled.memory
    assert on_cpu.program is None
    text = plan.describe(on_cpu)
    assert "mesh data=2 x fsdp=4, 2 examples a device" in text
    assert "no estimate of time: the compiler gives none for cpu" in text


def test_the_dump_has_the_program_and_the_summary(on_cpu, tmp_path):
    folder = tmp_path / "made" / "here"
    plan.open_dump(folder)
    plan.write_dump(on_cpu, folder)
    assert (folder / "train_step.txt").read_text().startswith("HloModule jit_step")
    summary = json.loads((folder / "train_step.json").read_text())
    assert summary == plan.as_json(on_cpu)
    assert summary["compiled"]["memory_bytes"] == on_cpu.compiled.memory


def compile_decoding(**options: object) -> plan.CompiledDecoding:
    config = tiny(**{"model.text_dtype": "bfloat16"})
    return plan.compile_decoding(config, batch_size=13, prompt_tokens=5, max_new_tokens=4, **options)


def test_decoding_for_the_devices_here_tells_what_a_token_reads(tmp_path):
    decoding = compile_decoding()
    assert (decoding.compiled.mesh, decoding.compiled.batch_size) == ({"data": 1, "fsdp": 8}, 16)
    text = preset("tiny").text
    slots, rows, two_bytes = 49 + 5 + 3, 2, 2  # image, prompt, and all new tokens but the last
    assert decoding.cache == 2 * text.depth * rows * slots * text.num_kv_heads * text.head_dim * two_bytes
    queries = 2 * text.num_heads * text.head_dim  # with the products that follow
    attention = text.width * (queries + 2 * text.num_kv_heads * text.head_dim)
    split = (3 * text.depth * text.width * text.mlp_dim + text.vocab_size * text.width) // 8
    norms = (2 * text.depth + 1) * text.width * 4  # float32
    assert decoding.weights == two_bytes * (text.depth * attention + split) + norms
    assert decoding.token is None
    assert "no estimate of time: the compiler gives none for cpu" in plan.describe(decoding)

    plan.write_dump(decoding, tmp_path)
    assert (tmp_path / "generate.txt").read_text().startswith("HloModule jit__decode")
    assert json.loads((tmp_path / "generate.json").read_text()) == plan.as_json(decoding)


# As libtpu 0.0.42 says it.
TOO_LARGE = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (108.84G) exceeds "
    "available HBM (15.75G).",
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 108.84G of "
    "15.75G hbm. Exceeded hbm capacity by 93.09G.",
)


@pytest.mark.parametrize("message", TOO_LARGE)
def test_a_step_that_does_not_fit_says_by_how_much_and_what_helps(monkeypatch, message):
    def compile_too_large(lowered, *arguments, **options):
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(jax.stages.Lowered, "compile", compile_too_large)
    with pytest.raises(ConfigError) as caught:
        plan.compile_train_step(tiny(**{"mesh.data": 2, "model.remat": "dots"}))
    assert str(caught.value) == (
        "The step does not fit: it wants 108.84 GiB of each device, which has 15.75 GiB. What helps: a smaller "
        "config.batch_size (now 16, 2 rows a device); a larger config.gradient_accumulation_steps; "
        "--config.model.remat=full (now dots); a larger config.mesh.fsdp (now 4); more devices."
    )


@needs_libtpu
@pytest.mark.slow
def test_a_step_for_described_tpus_tells_its_time():
    step = plan.compile_train_step(tiny(), devices=plan.describe_devices("v5e:2x4"))
    assert step.compiled.devices == "8 x TPU v5 lite"
    summary = plan.as_json(step)
    compiled, estimated = summary["compiled"], summary["estimated"]
    assert compiled["cycles"] > 0 and compiled["loops_of_unknown_length"] == []
    assert compiled["collectives"]["all-gather"]["count"] > 0
    assert estimated["larger_seconds"] == max(estimated["compute_seconds"], estimated["link_seconds"])
    assert "ms a step, at 1.5 GHz" in plan.describe(step)


@needs_libtpu
@pytest.mark.slow
def test_decoding_for_described_tpus_tells_prefill_and_token_apart():
    decoding = compile_decoding(devices=plan.describe_devices("v5e:2x4"))
    summary = plan.as_json(decoding)
    compiled, estimated = summary["compiled"], summary["estimated"]
    assert compiled["prefill"]["cycles"] > compiled["token"]["cycles"] > 0
    assert compiled["prefill"]["loops_of_unknown_length"] == []
    # Of each layer two, and five at the ends.
    assert compiled["token"]["collectives"] == 2 * preset("tiny").text.depth + 5
    reading = estimated["token_reading_seconds"]
    assert reading == (estimated["weight_bytes"] + estimated["cache_bytes"]) / 819e9
    busy = max(estimated["token_compute_seconds"], reading)
    assert estimated["token_seconds"] == busy + 5e-6 * compiled["token"]["collectives"]
    assert "at 819 GB/s, and 11 collectives of 5 us" in plan.describe(decoding)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v9z:4x4", "v5e:3x5"])
def test_a_topology_that_there_is_not_is_told_with_the_compilers_words(topology):
    with pytest.raises(ConfigError, match=f"--topology={topology}: expected .*; the compiler says: INVALID"):
        plan.describe_devices(topology)
