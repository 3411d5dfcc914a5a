"""Folders written with pgdist's tables, as transformers reads them, and its own, as pgdist reads them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
import pytest
import sentencepiece
from PIL import Image

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="needs PyTorch: install pgdist[parity]")
transformers = pytest.importorskip("transformers", reason="needs transformers: install pgdist[parity]")

from safetensors.numpy import load_file, save_file  # noqa: E402

from pgdist import weights  # noqa: E402
from pgdist.data.images import load_image  # noqa: E402
from pgdist.data.text import encode_example  # noqa: E402
from pgdist.data.tokenizer import Tokenizer  # noqa: E402
from pgdist.models import PRESETS, PaliGemma, PaliGemmaConfig, normalize_image  # noqa: E402
from pgdist.parameters import flatten  # noqa: E402
from pgdist.weights import boxes, transformers_config, transformers_layout  # noqa: E402
from pgdist.weights.array_info import ArrayInfo  # noqa: E402
from pgdist.weights.boxes import Box  # noqa: E402
from pgdist.weights.pieces import Piece  # noqa: E402
from tests.decode.model import decode_batch  # noqa: E402
from tests.models.small import SMALL, random_parameters, with_image, with_text  # noqa: E402
from tests.parity.conversion import reference_inputs  # noqa: E402
from tests.parity.test_transformers import make_batch, model_inputs  # noqa: E402

CONFIGS = SMALL | {
    "paligemma2-capped": with_text(SMALL["paligemma2"], final_logits_softcap=30.0),
    "paligemma-capped": with_text(SMALL["paligemma"], final_logits_softcap=5.0),
    "paligemma2-uncapped": with_text(SMALL["paligemma2"], attn_logits_softcap=0.0),
}
ROOT = Path(__file__).parents[2]
ASSETS = ROOT / "assets"
TOKENIZER = ASSETS / "tiny_tokenizer.model"

torch.set_num_threads(1)  # these models are too small to share: more threads only wait for each other

every_config = pytest.mark.parametrize("name", CONFIGS)


def write_model(folder: Path, config: PaliGemmaConfig, flat: Mapping[str, np.ndarray]) -> None:
    """config.json and one model.safetensors in float32."""
    rows = transformers_config.padded_vocab_size(config)
    stored = {}
    for name, tensor in transformers_layout.tensors(config, padded_vocab_size=rows).items():
        piece, array = tensor.piece, flat[tensor.model_name]
        view = np.zeros(piece.view, np.float32)
        view[slices(box_of(piece, array.shape))] = array[piece.index].transpose(np.argsort(piece.axes))
        stored[name] = view.reshape(tensor.shape)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    write_config(folder, transformers_config.to_json(config, dtype="float32"))


def write_config(folder: Path, content: Mapping[str, object]) -> None:
    (folder / "config.json").write_text(json.dumps(content))


def read_config(folder: Path) -> PaliGemmaConfig:
    path = folder / "config.json"
    return transformers_config.from_json(json.loads(path.read_text()), path=path)


def read_arrays(folder: Path, config: PaliGemmaConfig) -> dict[str, np.ndarray]:
    """The model's arrays in a folder."""
    stored = load_file(folder / "model.safetensors")
    infos = [ArrayInfo(name=name, shape=x.shape, dtype=x.dtype) for name, x in stored.items()]
    flat = {}
    for name, array in transformers_layout.model_arrays(infos, config, path=folder).items():
        flat[name] = np.full(array.info.shape, np.nan, array.info.dtype)
        for piece in array.pieces:
            view = stored[piece.stored_name].reshape(piece.view)
            view_box = box_of(piece, array.info.shape)
            box, numbers = piece.to_model(view_box, view[slices(view_box)])
            flat[name][slices(box)] = numbers
    return flat


def box_of(piece: Piece, shape: tuple[int, ...]) -> Box:
    """The part of the view that the piece is, of a model's array of this shape."""
    lead = tuple((at, at + 1) for at in piece.index)
    return piece.view_box(lead + boxes.whole(shape)[len(lead) :])


def slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(*pair) for pair in box)


def load_by_transformers(folder: Path) -> transformers.PaliGemmaForConditionalGeneration:
    """The model, after a look at what transformers says about its loading."""
    model, report = transformers.PaliGemmaForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()), report
    assert model.dtype == torch.float32
    return model.eval()


def logits_by_transformers(
    folder: Path, config: PaliGemmaConfig, inputs: tuple[np.ndarray, ...]
) -> np.ndarray:
    """float32[B, T, V]."""
    with torch.no_grad():
        logits = load_by_transformers(folder)(**reference_inputs(config, *inputs)).logits
    return logits[:, config.image.num_tokens :, : config.text.vocab_size].numpy()


def our_logits(config: PaliGemmaConfig, params: dict, inputs: tuple[np.ndarray, ...]) -> np.ndarray:
    image, *text = inputs
    return np.asarray(jax.jit(PaliGemma(config).apply)({"params": params}, normalize_image(image), *text))


@every_config
def test_transformers_loads_all_of_a_written_folder_and_computes_the_same_logits(name, tmp_path):
    config = CONFIGS[name]
    params = random_parameters(config, seed=2)
    inputs = model_inputs(make_batch(config, seed=2))
    write_model(tmp_path, config, flatten(params))
    theirs = logits_by_transformers(tmp_path, config, inputs)
    real = inputs[-1].astype(bool)
    assert 0.5 < theirs[real].std() < 2.0
    np.testing.assert_allclose(our_logits(config, params, inputs)[real], theirs[real], rtol=0, atol=2e-5)


@every_config
def test_what_transformers_saves_is_read_back_bitwise(name, tmp_path):
    config = CONFIGS[name]
    flat = flatten(random_parameters(config, seed=3))
    write_model(tmp_path, config, flat)
    load_by_transformers(tmp_path).save_pretrained(tmp_path / "saved")
    assert read_config(tmp_path / "saved") == config
    assert_bitwise(read_arrays(tmp_path / "saved", config), flat)


@pytest.mark.parametrize(
    "part", ["made anew", "without head", "decoder", "decoder with head", "tower", "tower with head"]
)
@pytest.mark.parametrize("name", SMALL)
def test_what_transformers_saves_of_a_model_or_a_part_is_read_back_bitwise(name, part, tmp_path):
    """Each gives its tensors names of its own."""
    config = SMALL[name]
    flat = flatten(random_parameters(config, seed=3))
    write_model(tmp_path, config, flat)
    model = load_by_transformers(tmp_path)
    model.config.vision_config.vision_use_head = part == "tower with head"
    saved = {
        "made anew": lambda: copy_of(type(model)(model.config), model),
        "without head": lambda: copy_of(type(model.model)(model.config), model.model),
        "decoder": lambda: model.model.language_model,
        "decoder with head": lambda: with_decoder(model),
        "tower": lambda: model.model.vision_tower,
        "tower with head": lambda: copy_of(
            transformers.SiglipVisionModel(model.config.vision_config), model.model.vision_tower
        ),
    }[part]()
    saved.save_pretrained(tmp_path / "saved")
    prefixes = {"decoder": "llm/", "tower": ("img/embedding", "img/pos", "img/Transformer")}
    prefix = prefixes.get(part.split()[0], "")
    expected = {key: array for key, array in flat.items() if key.startswith(prefix)}
    assert_bitwise(read_arrays(tmp_path / "saved", config), expected)


def copy_of(new: torch.nn.Module, old: torch.nn.Module) -> torch.nn.Module:
    """`new` with the parameters of `old`; it may have others beside them."""
    assert not new.load_state_dict(old.state_dict(), strict=False).unexpected_keys
    return new


def with_decoder(model: transformers.PaliGemmaForConditionalGeneration) -> torch.nn.Module:
    """A Gemma by itself, as its own class saves it."""
    new = transformers.AutoModelForCausalLM.from_config(model.config.text_config)
    copy_of(new.model, model.model.language_model)
    return new


def assert_bitwise(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        np.testing.assert_array_equal(found[key], array, err_msg=key, strict=True)


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        pytest.param({"sliding_window": 8}, True, id="layers_of_full_attention"),
        pytest.param({"layer_types": None}, True, id="a_window_of_8192_for_versions_without_layer_types"),
        pytest.param({"sliding_window": 8, "layer_types": None}, False, id="what_a_window_does"),
    ],
)
def test_no_layer_of_a_written_gemma_2_is_windowed(changes, same, tmp_path):
    config = SMALL["paligemma2"]
    params = random_parameters(config, seed=2)
    inputs = model_inputs(make_batch(config, seed=2))
    write_model(tmp_path, config, flatten(params))
    content = transformers_config.to_json(config, dtype="float32")
    content["text_config"] |= changes
    write_config(tmp_path, content)
    theirs = logits_by_transformers(tmp_path, config, inputs)
    real = inputs[-1].astype(bool)
    difference = np.abs(our_logits(config, params, inputs) - theirs)[real].max()
    assert difference <= 2e-5 if same else difference > 0.1


@pytest.mark.parametrize("name", [*PRESETS, *CONFIGS])
def test_a_config_survives_transformers(name, tmp_path):
    """Its classes leave out what equals their defaults when they write, and fill it in when they read."""
    config = (PRESETS | CONFIGS)[name]
    write_config(tmp_path, transformers_config.to_json(config, dtype="bfloat16"))
    read = transformers.AutoConfig.from_pretrained(tmp_path)
    assert read.dtype == read.text_config.dtype == torch.bfloat16
    assert read.vision_config.num_hidden_layers == config.image.depth
    assert read.text_config.num_image_tokens == config.image.num_tokens
    for saved in (read.to_dict(), read.to_diff_dict()):
        content = json.loads(json.dumps(saved, default=str))
        assert transformers_config.from_json(content, path="config.json") == config


@pytest.mark.parametrize(
    ("defaults", "kind"),
    [
        (transformers_config._TEXT_DEFAULTS["gemma"], "GemmaConfig"),
        (transformers_config._TEXT_DEFAULTS["gemma2"], "Gemma2Config"),
        (transformers_config._VISION_DEFAULTS, "SiglipVisionConfig"),
        (transformers_config._TOP_DEFAULTS, "PaliGemmaConfig"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_absent_keys_have_the_defaults_of_transformers(defaults, kind):
    found = getattr(transformers, kind)()
    assert defaults == {key: getattr(found, key, None) for key in defaults}


# -- the processor's files, with the model that the repository carries -----------------------------------


TEXTS = [
    "caption en",
    "detect green square",
    "where is the  green   triangle",
    "  leading and trailing ",
    "<loc0001><loc1023> green square ; <seg000><seg127>",
    "lines\nand\n\nlines\n",
    "Größe, 日本語, 😀 and e\u0301",
    "tab\there",
    "UPPER case & <b>",
    "'quoted', 12345.678!?",
    "",
    " ",
    "\n",
    "▁ is not a space",
]


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    config = PRESETS["tiny"]
    expected = weights.read_header(ASSETS / "tiny.npz")
    flat = {
        name: np.asarray(x, np.float32)
        for name, x in weights.load(ASSETS / "tiny.npz", expected=expected).items()
    }
    write_model(folder, config, flat)
    transformers_config.write_processor_files(folder, config=config, tokenizer=TOKENIZER, source=None)
    return folder


def write_picture(path: Path, size: tuple[int, int]) -> Path:
    """Large coloured areas, as the tiny model was trained on, saved without loss."""
    pixels = np.full((*size, 3), 230, np.uint8)
    pixels[: size[0] // 3, : size[1] // 3] = (200, 30, 30)
    pixels[size[0] // 2 :, size[1] // 2 :] = (30, 60, 200)
    Image.fromarray(pixels).save(path)
    return path


def test_the_tokenizer_gives_the_ids_of_the_sentencepiece_model(tiny_folder):
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tiny_folder), Tokenizer(TOKENIZER)
    assert len(theirs) == ours.vocab_size + 1
    assert theirs.convert_tokens_to_ids("<image>") == ours.vocab_size
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (2, 1, 0)
    for text in TEXTS:
        ids = ours.encode(text)
        assert theirs(text, add_special_tokens=False).input_ids == ids, text
        assert theirs(text).input_ids == [ours.bos_id, *ids], text
        if theirs.unk_token_id not in ids:
            assert theirs.decode(ids) == ours.decode(ids)


def test_a_tokenizer_like_gemmas_gives_the_ids_of_the_sentencepiece_model(tmp_path):
    """One with bytes for what has no piece, single digits, and pieces for runs of spaces and of newlines."""
    lines = [line for path in sorted(ROOT.glob("docs/**/*.md")) for line in path.read_text().split("\n")]
    lines = [line for line in lines if "<image>" not in line]  # to transformers a token of its own
    symbols = ["\n" * n for n in range(1, 32)] + ["▁" * n for n in range(2, 32)]
    symbols += ["<mask>", "<table>", "</h1>", "<unused3>", *(f"<loc{i:04d}>" for i in range(1024))]
    symbols += [f"<seg{i:03d}>" for i in range(128)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for line in lines if line]), model_prefix=tmp_path / "gemma", model_type="bpe",
        vocab_size=3000, byte_fallback=True, split_digits=True, user_defined_symbols=symbols,
        allow_whitespace_only_pieces=True, pad_id=0, eos_id=1, bos_id=2, unk_id=3, bos_piece="<bos>",
        eos_piece="<eos>", pad_piece="<pad>", normalization_rule_name="identity", add_dummy_prefix=False,
        remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    ours = Tokenizer(tmp_path / "gemma.model")
    config = with_text(PRESETS["tiny"], vocab_size=ours.vocab_size)
    write_config(tmp_path, transformers_config.to_json(config, dtype="float32"))
    transformers_config.write_processor_files(
        tmp_path, config=config, tokenizer=tmp_path / "gemma.model", source=None
    )
    theirs = transformers.AutoProcessor.from_pretrained(tmp_path).tokenizer
    assert theirs.convert_tokens_to_ids("<image>") == ours.vocab_size
    # Runs beyond the longest piece, and U+2581 that stands for itself, are not cut alike.
    texts = [text for text in [*lines, "\n".join(lines), *TEXTS] if " " * 32 not in text and "▁" not in text]
    for text in texts:
        ids = ours.encode(text)
        assert theirs(text, add_special_tokens=False).input_ids == ids, text
        assert theirs.decode(ids) == text


def test_a_tokenizer_with_fewer_pieces_than_the_model_embeds_still_has_image_behind_them(tmp_path):
    config = with_text(PRESETS["tiny"], vocab_size=1400)
    write_config(tmp_path, transformers_config.to_json(config, dtype="float32"))
    transformers_config.write_processor_files(tmp_path, config=config, tokenizer=TOKENIZER, source=None)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path)
    assert processor.image_token_id == processor.tokenizer.convert_tokens_to_ids("<image>") == 1400


@pytest.mark.parametrize("text", TEXTS)
def test_the_processor_makes_our_prompts_and_pixels(tiny_folder, tmp_path, text):
    config, tokenizer = PRESETS["tiny"], Tokenizer(TOKENIZER)
    size, tokens = config.image.image_size, config.image.num_tokens
    picture = write_picture(tmp_path / "picture.png", (size, size))
    processor = transformers.AutoProcessor.from_pretrained(tiny_folder)
    inputs = processor(images=Image.open(picture), text="<image>" + text, return_tensors="np")
    ours = encode_example(tokenizer, prefix=text, suffix=None, length=64)
    ids = ours.text[ours.mask_input == 1]
    assert inputs["input_ids"][0].tolist() == [config.text.vocab_size] * tokens + ids.tolist()
    pixels = normalize_image(load_image(picture, size=size))
    # Two roundings of values up to 1 on each side.
    np.testing.assert_allclose(inputs["pixel_values"][0].transpose(1, 2, 0), pixels, rtol=0, atol=5e-7)


def test_the_processor_marks_the_suffix_as_we_do(tiny_folder, tmp_path):
    config, tokenizer = PRESETS["tiny"], Tokenizer(TOKENIZER)
    picture = Image.open(write_picture(tmp_path / "picture.png", (56, 56)))
    processor = transformers.AutoProcessor.from_pretrained(tiny_folder)
    inputs = processor(images=picture, text="<image>count circles", suffix="<loc0001> 2", return_tensors="np")
    ours = encode_example(tokenizer, prefix="count circles", suffix="<loc0001> 2", length=64)
    real = ours.mask_input == 1
    n = config.image.num_tokens
    assert inputs["input_ids"][0, n:].tolist() == ours.text[real].tolist()
    assert inputs["token_type_ids"][0, n:].tolist() == ours.mask_ar[real].tolist()
    assert not inputs["token_type_ids"][0, :n].any()


@pytest.mark.parametrize("shape", [(301, 200), (40, 30)])
def test_the_processor_resizes_as_we_do_to_one_level(tiny_folder, tmp_path, shape):
    picture = write_picture(tmp_path / "picture.png", shape)
    processor = transformers.AutoProcessor.from_pretrained(tiny_folder)
    theirs = processor.image_processor(Image.open(picture), return_tensors="np")["pixel_values"][0]
    ours = normalize_image(load_image(picture, size=56))
    # Pillow's 8-bit filter rounds once an axis: at most a whole level of 1 / 127.5. Bicubic is off by dozens.
    np.testing.assert_allclose(theirs.transpose(1, 2, 0), ours, rtol=0, atol=1.001 / 127.5)


def test_generate_answers_as_we_do(tiny_folder, tmp_path):
    config, tokenizer = PRESETS["tiny"], Tokenizer(TOKENIZER)
    picture = write_picture(tmp_path / "picture.png", (56, 56))
    processor = transformers.AutoProcessor.from_pretrained(tiny_folder)
    model = load_by_transformers(tiny_folder)
    unused = range(config.text.vocab_size, model.config.text_config.vocab_size)
    assert model.generation_config.suppress_tokens == list(unused)
    params = jax.tree.map(jax.numpy.asarray, nested(read_arrays(tiny_folder, config)))
    for prefix in ("caption en", "detect red square", "count circles"):
        inputs = processor(images=Image.open(picture), text="<image>" + prefix, return_tensors="pt")
        answer = model.generate(**inputs, max_new_tokens=20, do_sample=False)[
            0, inputs["input_ids"].shape[1] :
        ]
        ours = encode_example(tokenizer, prefix=prefix, suffix=None, length=16)
        batch = {
            "image": load_image(picture, size=56)[None],
            "text": ours.text[None],
            "mask_ar": ours.mask_ar[None],
            "mask_input": ours.mask_input[None],
            "weight": np.ones(1, np.float32),
        }
        found, _ = decode_batch(config, params, batch, eos_id=1, max_new_tokens=20)
        expected = tokenizer.decode(found.tokens[0, 0])
        assert expected and processor.decode(answer, skip_special_tokens=True) == expected


def nested(flat: Mapping[str, np.ndarray]) -> dict:
    tree: dict = {}
    for name, array in flat.items():
        *folders, leaf = name.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = array
    return tree


def test_tokenizer_files_are_copied_from_where_the_weights_came_from(tiny_folder, tmp_path):
    source, folder = tmp_path / "source", tmp_path / "written"
    folder.mkdir()
    transformers.AutoProcessor.from_pretrained(tiny_folder).save_pretrained(source)
    config = with_image(PRESETS["tiny"], image_size=112)
    write_config(folder, transformers_config.to_json(config, dtype="float32"))
    transformers_config.write_processor_files(folder, config=config, tokenizer=None, source=source)
    assert (folder / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    processor = transformers.AutoProcessor.from_pretrained(folder)
    assert processor.image_token_id == 1344
    # The size is the model's, which may read larger images than its source did.
    pixels = processor.image_processor(Image.new("RGB", (30, 40)), return_tensors="np")["pixel_values"]
    assert pixels.shape == (1, 3, 112, 112)
    assert processor.image_seq_length == math.prod((14, 14))
    for text in TEXTS:
        assert processor.tokenizer(text, add_special_tokens=False).input_ids == Tokenizer(TOKENIZER).encode(
            text
        )
