"""Exports of every kind, loaded by transformers as its users do: the same logits and the same answers."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="needs PyTorch: install pgdist[parity]")
transformers = pytest.importorskip("transformers", reason="needs transformers: install pgdist[parity]")

from pgdist import weights  # noqa: E402
from pgdist.finetune import finetune  # noqa: E402
from pgdist.models import PaliGemma  # noqa: E402
from pgdist.models.presets import PRESETS  # noqa: E402
from pgdist.parameters import flatten, unflatten  # noqa: E402
from pgdist.weights import safetensors_writer  # noqa: E402
from tests.decode.model import NEVER, decode_batch  # noqa: E402
from tests.models.small import PAD, SMALL, random_parameters  # noqa: E402
from tests.parity.conversion import reference_inputs  # noqa: E402
from tests.parity.test_transformers import jitted_logits, make_batch, model_inputs  # noqa: E402
from tests.tiny_runs import assert_same_bits, tiny_config, write_inputs  # noqa: E402

NEW_TOKENS = 20

torch.set_num_threads(1)  # these models are too small to share: more threads only wait for each other

every_model = pytest.mark.parametrize("name", SMALL)


def load(folder):
    model, info = transformers.PaliGemmaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


def stored(path):
    with np.load(path) as file:
        return dict(file)


def logits_of(model, config, inputs):
    with torch.no_grad():
        found = model(**reference_inputs(config, *inputs)).logits[:, config.image.num_tokens :].numpy()
    return found[..., : config.text.vocab_size]  # the rows behind are no words


def greedy_of(model, config, batch):
    """int64[B, NEW_TOKENS], from prompts that end together: padding stands left of the text, after the image."""
    counts = (batch["mask_input"] * (1 - batch["mask_ar"])).sum(axis=1)
    prompt = np.full((len(counts), counts.max()), PAD, np.int32)
    mask = np.zeros_like(prompt)
    for row, count in enumerate(counts):
        prompt[row, -count:], mask[row, -count:] = batch["text"][row, :count], 1
    inputs = reference_inputs(config, batch["image"], prompt, np.zeros_like(mask), mask)
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        tokens = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=PAD)
    return tokens[:, inputs["input_ids"].shape[1] :].numpy()


@pytest.mark.parametrize("shards", ["one file", "shards"])
@every_model
def test_an_exported_npz_gives_the_same_logits_and_answers_in_transformers(
    name, shards, tmp_path, monkeypatch
):
    if shards == "shards":
        split = functools.partial(safetensors_writer.SafetensorsWriter, shard_bytes=100_000)
        monkeypatch.setattr("pgdist.weights.converting.SafetensorsWriter", split)
    config = SMALL[name]
    params = random_parameters(config, seed=2)
    weights.save(tmp_path / "a.npz", flatten(params))
    weights.convert(tmp_path / "a.npz", tmp_path / "hf", config=config)  # shapes do not tell its query scale
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists() == (shards == "shards")

    model, batch = load(tmp_path / "hf"), make_batch(config, seed=2)
    inputs = model_inputs(batch)
    real = inputs[-1].astype(bool)
    ours = np.asarray(jitted_logits(name)(params, *inputs))
    np.testing.assert_allclose(ours[real], logits_of(model, config, inputs)[real], rtol=0, atol=2e-5)
    found, _ = decode_batch(config, params, batch, eos_id=NEVER, max_new_tokens=NEW_TOKENS)
    np.testing.assert_array_equal(found.tokens[:, 0], greedy_of(model, config, batch))


@every_model
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_npz_to_transformers_to_npz_is_bitwise_equal(name, dtype, tmp_path):
    weights.save(
        tmp_path / "a.npz", flatten(random_parameters(SMALL[name], seed=2)), dtype=jax.numpy.dtype(dtype)
    )
    weights.convert(tmp_path / "a.npz", tmp_path / "hf")
    weights.convert(tmp_path / "hf", tmp_path / "b.npz")
    assert_same_bits(stored(tmp_path / "b.npz"), stored(tmp_path / "a.npz"))


@every_model
def test_what_transformers_saves_comes_back_bitwise(name, tmp_path):
    """Its own names, its own sharding: our npz -> transformers, which loads and saves it -> our npz."""
    weights.save(tmp_path / "a.npz", flatten(random_parameters(SMALL[name], seed=3)))
    weights.convert(tmp_path / "a.npz", tmp_path / "hf")
    load(tmp_path / "hf").save_pretrained(tmp_path / "theirs", max_shard_size="200KB")
    weights.convert(tmp_path / "theirs", tmp_path / "b.npz")
    assert_same_bits(stored(tmp_path / "b.npz"), stored(tmp_path / "a.npz"))


def test_a_runs_checkpoint_is_exported_with_its_base_and_answers_as_here(tmp_path):
    inputs = write_inputs(tmp_path / "inputs")
    fields = {"trainable": (("llm/layers/attn/.*", 1.0), (".*", 0.0)), "frozen_dtype": "float32"}
    config = tiny_config(inputs, steps=4, **fields, **{"checkpoint.every": 2, "export": True})
    finetune(config, workdir=tmp_path / "run")
    weights.convert(f"{tmp_path / 'run'}@4", tmp_path / "hf")

    model, size = load(tmp_path / "hf"), PRESETS["tiny"]
    params = unflatten(stored(tmp_path / "run" / "model.npz"))
    batch = make_batch(size, seed=4)
    ids = model_inputs(batch)
    real = ids[-1].astype(bool)
    from pgdist.models import normalize_image

    ours = np.asarray(PaliGemma(size).apply({"params": params}, normalize_image(ids[0]), *ids[1:]))
    np.testing.assert_allclose(ours[real], logits_of(model, size, ids)[real], rtol=0, atol=2e-5)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "hf")
    assert processor.image_processor.size["height"] == size.image.image_size
