"""config.json and the processor's files, without transformers; tests/parity has what it makes of them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from pgdist.errors import WeightsError
from pgdist.models import PRESETS, PaliGemmaConfig
from pgdist.models.presets import config_of
from pgdist.weights.transformers_config import from_json, padded_vocab_size, to_json, write_processor_files
from tests.models.small import SMALL, flat_shapes, with_image, with_text

TOKENIZER = Path(__file__).parents[2] / "assets" / "tiny_tokenizer.model"
SMALL_1, SMALL_2 = SMALL.values()
CONFIGS = {
    **PRESETS,
    **SMALL,
    "gemma 1 with a final soft-cap": with_text(SMALL_1, final_logits_softcap=30.0),
    "gemma 2 with a final soft-cap": with_text(SMALL_2, final_logits_softcap=30.0),
    "gemma 2 without soft-caps": with_text(SMALL_2, attn_logits_softcap=0.0),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)

# As published; what they leave out is the default of transformers' classes.
PUBLISHED_1 = {
    "_name_or_path": "final-hf/paligemma-3b-pt-448",
    "architectures": ["PaliGemmaForConditionalGeneration"],
    "bos_token_id": 2,
    "eos_token_id": 1,
    "hidden_size": 2048,
    "ignore_index": -100,
    "image_token_index": 257_152,
    "model_type": "paligemma",
    "pad_token_id": 0,
    "projection_dim": 2048,
    "text_config": {
        "hidden_size": 2048,
        "intermediate_size": 16_384,
        "model_type": "gemma",
        "num_attention_heads": 8,
        "num_hidden_layers": 18,
        "num_image_tokens": 1024,
        "num_key_value_heads": 1,
        "torch_dtype": "float32",
        "vocab_size": 257_216,
    },
    "torch_dtype": "float32",
    "transformers_version": "4.41.0.dev0",
    "vision_config": {
        "hidden_size": 1152,
        "image_size": 448,
        "intermediate_size": 4304,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "num_image_tokens": 1024,
        "patch_size": 14,
        "projection_dim": 2048,
        "projector_hidden_act": "gelu_fast",
        "vision_use_head": False,
    },
    "vocab_size": 257_216,
}
PUBLISHED_2 = {
    "_vocab_size": 257_152,
    "architectures": ["PaliGemmaForConditionalGeneration"],
    "bos_token_id": 2,
    "eos_token_id": 1,
    "hidden_size": 2048,
    "image_token_index": 257_152,
    "model_type": "paligemma",
    "num_hidden_layers": 46,
    "pad_token_id": 0,
    "projection_dim": 4608,
    "text_config": {
        "architectures": ["Gemma2ForCausalLM"],
        "attn_logit_softcapping": 50.0,
        "cache_implementation": "hybrid",
        "eos_token_id": [1, 107],
        "final_logit_softcapping": 30.0,
        "head_dim": 128,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 4608,
        "intermediate_size": 36_864,
        "model_type": "gemma2",
        "num_attention_heads": 32,
        "num_hidden_layers": 46,
        "num_image_tokens": 256,
        "num_key_value_heads": 16,
        "query_pre_attn_scalar": 144,
        "rope_theta": 10_000.0,
        "sliding_window": 4096,
        "torch_dtype": "bfloat16",
        "vocab_size": 257_216,
    },
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.0.dev0",
    "vision_config": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "num_image_tokens": 256,
        "num_positions": 256,
        "patch_size": 14,
        "projection_dim": 4608,
        "torch_dtype": "bfloat16",
        "vision_use_head": False,
    },
}


def read(content: object) -> PaliGemmaConfig:
    return from_json(json.loads(json.dumps(content)), path="hub/config.json")


@every_config
def test_what_is_written_is_read_back(config):
    assert read(to_json(config, dtype="bfloat16")) == config


def test_the_published_files_are_the_presets():
    assert read(PUBLISHED_1) == PRESETS["paligemma-3b-448"]
    assert read(PUBLISHED_2) == with_text(PRESETS["paligemma2-28b-224"], final_logits_softcap=30.0)


def test_a_gemma_2_that_says_nothing_is_the_smallest():
    content = {
        "model_type": "paligemma",
        "image_token_index": 257_152,
        "projection_dim": 2304,
        "text_config": {"model_type": "gemma2", "vocab_size": 257_216},
        "vision_config": PUBLISHED_2["vision_config"],
    }
    assert read(content) == with_text(PRESETS["paligemma2-3b-224"], final_logits_softcap=30.0)


def test_what_is_written_agrees_with_what_is_published():
    """In every key that is in both, but for the window that pgdist does not have."""
    written = {
        "paligemma-3b-448": (to_json(PRESETS["paligemma-3b-448"], dtype="float32"), PUBLISHED_1),
        "paligemma2-28b-224": (
            to_json(with_text(PRESETS["paligemma2-28b-224"], final_logits_softcap=30.0), dtype="bfloat16"),
            PUBLISHED_2,
        ),
    }
    for ours, published in written.values():
        for part in ("text_config", "vision_config"):
            shared = ours[part].keys() & published[part].keys() - {"sliding_window"}
            assert {key: ours[part][key] for key in shared} == {key: published[part][key] for key in shared}
        assert ours["image_token_index"] == 257_152
        assert ours["vocab_size"] == ours["text_config"]["vocab_size"] == 257_216


def test_the_vocabulary_is_padded_with_room_for_the_image_token():
    vocabularies = {1343: 1344, 1344: 1408, 1400: 1408, 257_152: 257_216}
    config = PRESETS["tiny"]
    padded = {size: padded_vocab_size(with_text(config, vocab_size=size)) for size in vocabularies}
    assert padded == vocabularies


@pytest.mark.parametrize(
    ("token", "rows", "size"), [(320, 384, 320), (320, 320, 320), (400, 384, 384), (320, 576, 320)]
)
def test_the_vocabulary_ends_at_the_image_token(token, rows, size):
    content = to_json(SMALL_2, dtype="float32") | {"image_token_index": token}
    content["text_config"]["vocab_size"] = rows
    assert read(content).text.vocab_size == size


def test_no_layer_of_a_gemma_2_is_windowed():
    text = to_json(SMALL_2, dtype="float32")["text_config"]
    assert text["layer_types"] == ["full_attention"] * 3
    assert text["sliding_window"] >= 4096 + 1024


@every_config
def test_sizes_are_found_in_the_shapes(config):
    assert config_of(
        flat_shapes(config), final_logits_softcap=config.text.final_logits_softcap
    ) == expected_of(config)


def expected_of(config: PaliGemmaConfig) -> PaliGemmaConfig:
    """What shapes tell: of sizes that are no preset's, the usual scale and soft-cap."""
    if config in PRESETS.values():
        return config
    text = config.text
    return with_text(config, query_scale=text.head_dim**-0.5, attn_logits_softcap=50.0 * text.post_norms)


def test_sizes_of_a_preset_with_another_vocabulary_or_image_keep_its_query_scale():
    config = with_image(with_text(PRESETS["paligemma2-28b-224"], vocab_size=300_000), image_size=336)
    assert config_of(flat_shapes(config)) == config


def replaced(path: str, value: object) -> dict:
    """A config.json with another value at "part.key"; ... removes the key."""
    content = json.loads(json.dumps(to_json(SMALL_2, dtype="float32")))
    *parts, key = path.split(".")
    section = content
    for part in parts:
        section = section[part]
    section[key] = value
    if value is ...:
        del section[key]
    return content


WRONG = [
    ("model_type", "llava", "model_type is 'llava', expected 'paligemma'"),
    ("model_type", ..., "model_type is None, expected 'paligemma'"),
    ("text_config", ..., "text_config is None, expected an object"),
    ("vision_config", [], "vision_config is [], expected an object"),
    ("text_config.model_type", "gemma3_text", "text_config.model_type is 'gemma3_text', expected 'gemma' or 'gemma2'"),
    ("vision_config.model_type", "clip_vision_model", "expected 'siglip_vision_model'"),
    ("text_config.hidden_size", "72", "text_config.hidden_size is '72', expected a whole number above 0"),
    ("text_config.num_hidden_layers", 0, "text_config.num_hidden_layers is 0"),
    ("text_config.head_dim", True, "text_config.head_dim is True"),
    ("text_config.head_dim", None, "text_config.head_dim is None"),
    ("text_config.query_pre_attn_scalar", None, "text_config.query_pre_attn_scalar is None"),
    ("text_config.attn_logit_softcapping", -1.0, "attn_logit_softcapping is -1.0, expected a number above 0"),
    ("text_config.num_key_value_heads", 3, "num_key_value_heads is 3, expected a divisor of num_attention_heads, 4"),
    ("text_config.rope_theta", 1e6, "text_config.rope_theta is 1000000.0, expected 10000.0"),
    ("text_config.rope_parameters", {"rope_theta": 1e6}, "text_config.rope_parameters.rope_theta is 1000000.0"),
    ("text_config.rms_norm_eps", 1e-5, "text_config.rms_norm_eps is 1e-05, expected 1e-06"),
    ("text_config.hidden_activation", "silu", "hidden_activation is 'silu', expected 'gelu_pytorch_tanh'"),
    ("text_config.vocab_size", 600, "image_token_index is 320, expected the last token of all"),
    ("tie_word_embeddings", False, "tie_word_embeddings is False, expected True"),
    ("projection_dim", ..., "projection_dim is 2048, expected 72, as text_config.hidden_size"),
    ("vision_config.hidden_act", "quick_gelu", "vision_config.hidden_act is 'quick_gelu'"),
    ("vision_config.image_size", [56, 70], "vision_config.image_size is [56, 70]"),
    ("vision_config.num_attention_heads", 5, "num_attention_heads is 5, expected a divisor of hidden_size, 48"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "expected"), WRONG)
def test_what_pgdist_has_not_is_an_error_that_names_file_and_key(key, value, expected):
    with pytest.raises(WeightsError) as caught:
        from_json(replaced(key, value), path="hub/config.json")
    assert str(caught.value).startswith("hub/config.json: ") and expected in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vision_config.image_size", [56, 56]),
        ("text_config.rope_parameters", {"rope_theta": 10_000.0, "rope_type": "default"}),
        ("text_config.rope_scaling", None),
        ("text_config.hidden_act", "gelu"),
        ("text_config.hidden_activation", None),
        ("text_config.sliding_window", 4096),
        ("vision_config.model_type", ...),
    ],
)
def test_other_ways_to_say_the_same_are_read(key, value):
    assert from_json(replaced(key, value), path="config.json") == SMALL_2


def test_a_json_that_is_no_object_is_an_error():
    with pytest.raises(WeightsError, match=r"config\.json: is a list, expected an object"):
        from_json([], path="config.json")


@pytest.mark.parametrize(
    "config",
    [
        with_text(SMALL_1, query_scale=0.1),
        with_text(SMALL_1, attn_logits_softcap=50.0),
        with_text(SMALL_2, query_scale=0.1234),
    ],
)
def test_a_model_that_transformers_has_not_is_not_written(config):
    with pytest.raises(WeightsError, match="npz"):
        to_json(config, dtype="float32")


# -- the processor's files ------------------------------------------------------------------------------


def written(folder: Path) -> dict[str, dict]:
    return {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}


def test_processor_files_say_the_sizes_of_the_model(tmp_path):
    config = PRESETS["tiny"]
    write_processor_files(tmp_path, config=config, tokenizer=TOKENIZER, source=None)
    assert (tmp_path / "tokenizer.model").read_bytes() == TOKENIZER.read_bytes()
    files = written(tmp_path)
    assert files["preprocessor_config.json"]["size"] == {"height": 56, "width": 56}
    assert files["preprocessor_config.json"]["image_seq_length"] == 49
    tokenizer = files["tokenizer_config.json"]
    assert [tokenizer[f"{kind}_token"] for kind in ("bos", "eos", "pad", "unk")] == [
        "<s>",
        "</s>",
        "<pad>",
        "<unk>",
    ]
    added = {i: token["content"] for i, token in tokenizer["added_tokens_decoder"].items()}
    assert added == {"1344": "<image>"}
    generation = files["generation_config.json"]
    assert generation == {
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "suppress_tokens": list(range(1344, 1408)),
    }


def test_tokens_without_a_piece_fill_the_ids_in_front_of_the_image_token(tmp_path):
    config = with_text(PRESETS["tiny"], vocab_size=1347)
    write_processor_files(tmp_path, config=config, tokenizer=TOKENIZER, source=None)
    added = written(tmp_path)["tokenizer_config.json"]["added_tokens_decoder"]
    assert list(added) == ["1344", "1345", "1346", "1347"]
    assert added["1347"]["content"] == "<image>"
    assert len({token["content"] for token in added.values()}) == 4


def test_without_a_tokenizer_there_are_the_other_files(tmp_path):
    write_processor_files(tmp_path, config=PRESETS["tiny"], tokenizer=None, source=None)
    assert written(tmp_path).keys() == {"preprocessor_config.json", "generation_config.json"}


def test_the_tokenizer_of_the_source_comes_first_and_its_other_files_stay(tmp_path):
    source, folder, cache = tmp_path / "source", tmp_path / "folder", tmp_path / "cache"
    for path in (source, folder, cache):
        path.mkdir()
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    for name in (*names, "preprocessor_config.json", "processor_config.json", "config.json"):
        # The Hub's cache has links.
        (cache / name).write_text(json.dumps({"of": name}))
        (source / name).symlink_to(cache / name)
    write_processor_files(folder, config=PRESETS["tiny"], tokenizer=TOKENIZER, source=source)
    files = written(folder)
    assert files.keys() == {*names, "preprocessor_config.json", "generation_config.json"}
    assert all(files[name] == {"of": name} for name in names)
    assert files["preprocessor_config.json"]["image_seq_length"] == 49
    assert not any(path.is_symlink() for path in folder.iterdir())


def test_a_source_without_a_tokenizer_gives_way_to_the_model_file(tmp_path):
    source, folder = tmp_path / "source", tmp_path / "folder"
    source.mkdir()
    folder.mkdir()
    (source / "tokenizer_config.json").write_text("{}")
    write_processor_files(folder, config=PRESETS["tiny"], tokenizer=TOKENIZER, source=source)
    assert (folder / "tokenizer.model").is_file()
    assert written(folder)["tokenizer_config.json"]["tokenizer_class"] == "GemmaTokenizer"


def test_a_tokenizer_that_is_none_or_too_large_is_an_error(tmp_path):
    config = PRESETS["tiny"]
    wrong = tmp_path / "wrong.model"
    wrong.write_bytes(b"not a model")
    for path in (wrong, tmp_path / "absent.model"):
        with pytest.raises(WeightsError, match=path.name):
            write_processor_files(tmp_path, config=config, tokenizer=path, source=None)
    small = dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=1000))
    with pytest.raises(WeightsError, match="has 1344 pieces, the model embeds 1000"):
        write_processor_files(tmp_path, config=small, tokenizer=TOKENIZER, source=None)
