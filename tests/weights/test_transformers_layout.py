"""The tables between transformers' tensors and the model's arrays, for every preset, and names of every kind."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest

from pgdist.errors import WeightsError
from pgdist.models import PRESETS, PaliGemmaConfig
from pgdist.weights import boxes
from pgdist.weights.array_info import ArrayInfo
from pgdist.weights.transformers_config import padded_vocab_size
from pgdist.weights.transformers_layout import Tensor, model_arrays, tensors
from tests.models.small import SMALL, flat_shapes, with_text
from tests.weights.samples import BFLOAT16

F16, F32, F64 = (np.dtype(name) for name in ("float16", "float32", "float64"))
SMALL_2 = SMALL["paligemma2"]

# Tensors of the published checkpoints: 16 a layer of the image tower, 9 or 11 a layer of the decoder.
PUBLISHED = {"paligemma-3b": 603, "paligemma2-3b": 727, "paligemma2-10b": 903, "paligemma2-28b": 947}


def table_of(config: PaliGemmaConfig) -> dict[str, Tensor]:
    return tensors(config, padded_vocab_size=padded_vocab_size(config))


def as_file(config: PaliGemmaConfig, dtype: np.dtype = F32) -> dict[str, ArrayInfo]:
    """What a published file lists, by name."""
    return {
        name: ArrayInfo(name=name, shape=tensor.shape, dtype=dtype)
        for name, tensor in table_of(config).items()
    }


def renamed(file: dict[str, ArrayInfo], *changes: tuple[str, str]) -> dict[str, ArrayInfo]:
    """With the start of each name replaced by the first change that is for it."""
    result = {}
    for name, info in file.items():
        old, new = next((change for change in changes if name.startswith(change[0])), ("", ""))
        name = new + name.removeprefix(old)
        result[name] = dataclasses.replace(info, name=name)
    return result


def message(file: dict[str, ArrayInfo], config: PaliGemmaConfig) -> list[str]:
    with pytest.raises(WeightsError) as caught:
        model_arrays(file.values(), config, path="model.safetensors")
    return str(caught.value).splitlines()


@pytest.mark.parametrize("name", [*PRESETS, *SMALL])
def test_the_pieces_of_all_tensors_are_the_model_once_and_whole(name):
    config = (PRESETS | SMALL)[name]
    table = table_of(config)
    arrays = model_arrays(as_file(config).values(), config, path="model.safetensors")
    assert {key: array.info.shape for key, array in arrays.items()} == flat_shapes(config)
    stored_names = [piece.stored_name for array in arrays.values() for piece in array.pieces]
    assert sorted(stored_names) == sorted(table)
    for array in arrays.values():
        whole = boxes.whole(array.info.shape)
        covered = []
        for piece in array.pieces:
            assert math.prod(piece.view) == math.prod(table[piece.stored_name].shape)
            lead = tuple((at, at + 1) for at in piece.index)
            view_box = piece.view_box(lead + whole[len(lead) :])
            assert boxes.intersect(view_box, boxes.whole(piece.view)) == view_box
            numbers = np.broadcast_to(np.int8(0), boxes.shape_of(view_box))
            box, numbers = piece.to_model(view_box, numbers)
            assert numbers.shape == boxes.shape_of(box)
            covered.append(box)
        assert sum(math.prod(boxes.shape_of(box)) for box in covered) == math.prod(array.info.shape)
        assert not any(boxes.intersect(a, b) for a, b in itertools.combinations(covered, 2))


@pytest.mark.parametrize("name", [*PRESETS, *SMALL])
def test_only_rows_behind_the_vocabulary_are_no_part_of_the_model(name):
    config = (PRESETS | SMALL)[name]
    stored = sum(math.prod(tensor.shape) for tensor in table_of(config).values())
    model = sum(math.prod(shape) for shape in flat_shapes(config).values())
    assert stored - model == (padded_vocab_size(config) - config.text.vocab_size) * config.text.width


@pytest.mark.parametrize("model", PUBLISHED)
@pytest.mark.parametrize("size", [224, 448, 896])
def test_numbers_of_tensors_are_the_published_ones(model, size):
    assert len(table_of(PRESETS[f"{model}-{size}"])) == PUBLISHED[model]


def test_names_and_shapes_of_paligemma_3b_are_the_published_ones():
    shapes = {name: tensor.shape for name, tensor in table_of(PRESETS["paligemma-3b-224"]).items()}
    text, image = "language_model.model", "vision_tower.vision_model"
    layer, block = f"{text}.layers.17", f"{image}.encoder.layers.26"
    expected = {
        f"{text}.embed_tokens.weight": (257_216, 2048),
        f"{text}.norm.weight": (2048,),
        f"{layer}.input_layernorm.weight": (2048,),
        f"{layer}.post_attention_layernorm.weight": (2048,),
        f"{layer}.self_attn.q_proj.weight": (2048, 2048),
        f"{layer}.self_attn.k_proj.weight": (256, 2048),
        f"{layer}.self_attn.v_proj.weight": (256, 2048),
        f"{layer}.self_attn.o_proj.weight": (2048, 2048),
        f"{layer}.mlp.gate_proj.weight": (16_384, 2048),
        f"{layer}.mlp.up_proj.weight": (16_384, 2048),
        f"{layer}.mlp.down_proj.weight": (2048, 16_384),
        "multi_modal_projector.linear.weight": (2048, 1152),
        "multi_modal_projector.linear.bias": (2048,),
        f"{image}.embeddings.patch_embedding.weight": (1152, 3, 14, 14),
        f"{image}.embeddings.patch_embedding.bias": (1152,),
        f"{image}.embeddings.position_embedding.weight": (256, 1152),
        f"{image}.post_layernorm.weight": (1152,),
        f"{image}.post_layernorm.bias": (1152,),
        f"{block}.mlp.fc1.weight": (4304, 1152),
        f"{block}.mlp.fc1.bias": (4304,),
        f"{block}.mlp.fc2.weight": (1152, 4304),
        f"{block}.mlp.fc2.bias": (1152,),
    }
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        expected |= {
            f"{block}.self_attn.{name}.weight": (1152, 1152),
            f"{block}.self_attn.{name}.bias": (1152,),
        }
    for name in ("layer_norm1", "layer_norm2"):
        expected |= {f"{block}.{name}.weight": (1152,), f"{block}.{name}.bias": (1152,)}
    last = {name for name in shapes if name.startswith((f"{layer}.", f"{block}.")) or ".layers." not in name}
    assert {name: shapes[name] for name in last} == expected


def test_the_first_norm_behind_attention_is_another_one_in_each_gemma():
    ends = {}
    for name, config in SMALL.items():
        table = table_of(config).items()
        ends[name] = {
            key.split(".")[-2]: tensor.model_name.split("/")[-2]
            for key, tensor in table
            if "layers.2." in key
        }
    assert ends["paligemma"]["post_attention_layernorm"] == "pre_ffw_norm"
    assert ends["paligemma2"]["post_attention_layernorm"] == "post_attention_norm"
    assert ends["paligemma2"]["pre_feedforward_layernorm"] == "pre_ffw_norm"
    assert ends["paligemma2"]["post_feedforward_layernorm"] == "post_ffw_norm"


TEXT, IMAGE, CONNECTOR = "language_model.model.", "vision_tower.vision_model.", "multi_modal_projector."
NAMES = {
    "since 4.52": (
        (TEXT, "model.language_model."),
        (IMAGE, "model.vision_tower.vision_model."),
        (CONNECTOR, "model.multi_modal_projector."),
    ),
    "of 5 in memory": (
        (TEXT, "model.language_model."),
        (IMAGE, "model.vision_tower."),
        (CONNECTOR, "model.multi_modal_projector."),
    ),
    "of 5 on disk": ((IMAGE, "vision_tower."),),
    "without a head": ((TEXT, "language_model."),),
    "with one model too many": ((TEXT, "model.language_model.model."),),
}


@pytest.mark.parametrize("changes", NAMES.values(), ids=NAMES)
def test_names_of_every_version_are_the_same_arrays(changes):
    file = as_file(SMALL_2)
    other = renamed(file, *changes)
    expected = model_arrays(file.values(), SMALL_2, path="a")
    found = model_arrays(other.values(), SMALL_2, path="b")
    assert list(found) == list(expected)
    for name, array in expected.items():
        pieces = [
            dataclasses.replace(p, stored_name=renamed_one(p.stored_name, changes)) for p in array.pieces
        ]
        assert found[name].info == array.info and list(found[name].pieces) == pieces


def renamed_one(name: str, changes: tuple[tuple[str, str], ...]) -> str:
    info = ArrayInfo(name=name, shape=(), dtype=F32)
    return next(iter(renamed({name: info}, *changes)))


PARTS = {
    "gemma": ((TEXT, "model."), "llm/"),
    "gemma without head": ((TEXT, ""), "llm/"),
    "siglip": ((IMAGE, "vision_model."), "img/"),
    "siglip since 5": ((IMAGE, ""), "img/"),
}


@pytest.mark.parametrize(("change", "prefix"), PARTS.values(), ids=PARTS)
def test_a_decoder_or_an_image_tower_alone_gives_its_arrays(change, prefix):
    alone = {name: info for name, info in as_file(SMALL_2).items() if name.startswith(change[0])}
    if prefix == "img/":
        # The rest of a published SigLIP.
        for name in ("vision_model.head.probe", "text_model.final_layer_norm.weight", "logit_scale"):
            alone[name] = ArrayInfo(name=name, shape=(1,), dtype=F32)
    found = model_arrays(renamed(alone, change).values(), SMALL_2, path="part")
    names = {name for name in flat_shapes(SMALL_2) if name.startswith(prefix)}
    assert found.keys() == names - {"img/head/kernel", "img/head/bias"}


def test_a_decoder_alone_may_have_a_smaller_vocabulary():
    file = as_file(with_text(SMALL_2, vocab_size=256))
    alone = {name: info for name, info in file.items() if name.startswith(TEXT)}
    alone[TEXT + "embed_tokens.weight"] = ArrayInfo(
        name=TEXT + "embed_tokens.weight", shape=(256, 72), dtype=F32
    )
    embedding = model_arrays(alone.values(), SMALL_2, path="gemma")["llm/embedder/input_embedding"]
    assert embedding.info.shape == embedding.pieces[0].view == (256, 72)


@pytest.mark.parametrize("rows", [320, 321, 384, 512])
def test_rows_behind_the_vocabulary_are_left_out(rows):
    name = TEXT + "embed_tokens.weight"
    file = as_file(SMALL_2) | {name: ArrayInfo(name=name, shape=(rows, 72), dtype=F32)}
    embedding = model_arrays(file.values(), SMALL_2, path="a")["llm/embedder/input_embedding"]
    assert embedding.info.shape == (320, 72) and embedding.pieces[0].view == (rows, 72)
    assert embedding.pieces[0].view_box(boxes.whole((320, 72))) == ((0, 320), (0, 72))


def test_the_head_is_the_embedding_where_there_is_no_other():
    file, name = as_file(SMALL_2), TEXT + "embed_tokens.weight"
    head = "language_model.lm_head.weight"
    both = file | {head: dataclasses.replace(file[name], name=head)}
    key = "llm/embedder/input_embedding"
    assert model_arrays(both.values(), SMALL_2, path="a")[key].pieces[0].stored_name == name
    del both[name]
    assert model_arrays(both.values(), SMALL_2, path="a")[key].pieces[0].stored_name == head


def test_constants_that_old_versions_stored_are_no_arrays():
    file = as_file(SMALL_2)
    for name in (f"{IMAGE}embeddings.position_ids", f"{TEXT}layers.0.self_attn.rotary_emb.inv_freq"):
        file[name] = ArrayInfo(name=name, shape=(16,), dtype=np.dtype(np.int64))
    assert model_arrays(file.values(), SMALL_2, path="a").keys() == flat_shapes(SMALL_2).keys()


def test_arrays_and_pieces_come_in_the_order_of_the_file():
    names = list(reversed(as_file(SMALL_2)))
    file = as_file(SMALL_2)
    arrays = model_arrays([file[name] for name in names], SMALL_2, path="a")
    for array in arrays.values():
        order = [names.index(piece.stored_name) for piece in array.pieces]
        assert order == sorted(order)
    firsts = [names.index(array.pieces[0].stored_name) for array in arrays.values()]
    assert firsts == sorted(firsts)


@pytest.mark.parametrize(
    ("one", "others", "common"),
    [(BFLOAT16, BFLOAT16, BFLOAT16), (F32, BFLOAT16, F32), (F16, F32, F32), (F16, BFLOAT16, F32), (F64, F16, F64)],
)  # fmt: skip
def test_layers_of_several_dtypes_become_the_narrowest_that_holds_all(one, others, common):
    file = as_file(SMALL_2, others)
    name = TEXT + "layers.1.mlp.up_proj.weight"
    file[name] = dataclasses.replace(file[name], dtype=one)
    arrays = model_arrays(file.values(), SMALL_2, path="a")
    assert arrays["llm/layers/mlp/gating_einsum"].info.dtype == common
    assert arrays["llm/layers/mlp/linear"].info.dtype == others


def without(file: dict[str, ArrayInfo], part: str) -> dict[str, ArrayInfo]:
    return {name: info for name, info in file.items() if part not in name}


def changed(file: dict[str, ArrayInfo], name: str, **fields: object) -> dict[str, ArrayInfo]:
    return file | {
        name: dataclasses.replace(file.get(name, ArrayInfo(name=name, shape=(4, 8), dtype=F32)), **fields)
    }


EMBEDDING = TEXT + "embed_tokens.weight"
QUERY = TEXT + "layers.1.self_attn.q_proj.weight"
LORA = "base_model.model.language_model.model.layers.0.self_attn.q_proj.lora_A.weight"
INT8 = np.dtype(np.int8)
WRONG = {
    "a layer is missing": (
        lambda f: without(f, "language_model.model.layers.2."),
        f"  - {TEXT}layers.2.input_layernorm.weight (72,)",
    ),
    "the connector is missing": (
        lambda f: without(f, CONNECTOR),
        "  - multi_modal_projector.linear.weight (72, 48)",
    ),
    "the embedding is missing": (lambda f: without(f, "embed_tokens"), f"  - {EMBEDDING} (320, 72)"),
    "a layer too many": (
        lambda f: changed(f, TEXT + "layers.3.input_layernorm.weight"),
        f"  + {TEXT}layers.3.input_layernorm.weight (4, 8)",
    ),
    "an unknown tensor": (lambda f: changed(f, "rewards.weight"), "  + rewards.weight (4, 8)"),
    "an adapter": (lambda f: changed(f, LORA), "These are LoRA adapters: merge them"),
    "another shape": (
        lambda f: changed(f, QUERY, shape=(64, 72)),
        f"  ! {QUERY}: file (64, 72), model (128, 72)",
    ),
    "another number of axes": (
        lambda f: changed(f, EMBEDDING, shape=(23_040,)),
        f"  ! {EMBEDDING}: file (23040,), model (320, 72)",
    ),
    "a vocabulary that is too small": (
        lambda f: changed(f, EMBEDDING, shape=(256, 72)),
        f"  ! {EMBEDDING}: file (256, 72), model (320, 72)",
    ),
    "integers": (lambda f: changed(f, QUERY, dtype=INT8), f"  ! {QUERY}: file int8, model float32"),
    "an array twice": (
        lambda f: changed(f, "model.language_model.norm.weight", shape=(72,)),
        "'model.language_model.norm.weight' are both",
    ),
    "no array at all": (lambda f: {}, "arrays missing (-): 90"),
}


@pytest.mark.parametrize(("change", "expected"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_one_error_that_names_it(change, expected):
    lines = message(change(as_file(SMALL_2)), SMALL_2)
    assert lines[0].startswith("model.safetensors")
    assert any(expected in line for line in lines), lines


def test_one_error_has_all_that_is_wrong():
    file = changed(without(as_file(SMALL_2), "post_layernorm"), "rewards.weight")
    lines = message(changed(file, QUERY, shape=(64, 72)), SMALL_2)
    assert lines[0] == (
        "model.safetensors does not fit the model: arrays missing (-): 2, unexpected (+): 1, "
        "of another shape or type (!): 1, fitting: 87"
    )
    assert [line[:4] for line in lines[1:5]] == ["  - ", "  - ", "  + ", "  ! "]
