"""Sources that cannot be used, of every format, by what is wrong with them: how each is made, and what must be said."""

import functools
import json

import numpy as np

from tests.models.small import SMALL
from tests.weights.samples import BFLOAT16, write_npz
from tests.weights.transformers_by_hand import (
    in_transformers,
    random_model,
    read_header,
    write_folder,
    write_raw,
    write_safetensors,
)

CONFIG = SMALL["paligemma"]
BIAS, STORED_BIAS = "img/head/bias", "multi_modal_projector.linear.bias"
SHARDS = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
INDEX = "model.safetensors.index.json"


@functools.cache
def model():
    return random_model(CONFIG)


def tensors(**changed):
    """As stored in a folder, with other numbers in the connector's bias."""
    flat = dict(model()) | {BIAS: changed.get("bias", model()[BIAS])}
    return in_transformers(flat, CONFIG, rows=384)


def with_number(number, dtype=np.float32):
    bias = model()[BIAS].astype(dtype)
    bias[5] = number
    return bias


def npz(**changed):
    return lambda folder: write_npz(folder / "w.npz", dict(model()) | changed)


def file(name, content):
    """A file of bytes, or of what a function makes of the good npz's."""

    def make(folder):
        good = npz()(folder).read_bytes()
        (folder / name).write_bytes(content(good) if callable(content) else content)
        return folder / name

    return make


def folder_with(change, *, shards=1):
    """A good folder after `change(folder)`."""

    def make(folder):
        write_folder(folder / "m", CONFIG, tensors(), shards=shards)
        change(folder / "m")
        return folder / "m"

    return make


def safetensors(content):
    """A good folder whose one file is what a function makes of its bytes."""

    def change(folder):
        path = folder / "model.safetensors"
        path.write_bytes(content(path.read_bytes()))

    return folder_with(change)


def header(change):
    """A good folder whose one file has a changed header: a dict that `change` edits, or the text that it returns."""

    def rewrite(folder):
        path = folder / "model.safetensors"
        found, content = read_header(path), path.read_bytes()
        data = content[8 + int.from_bytes(content[:8], "little") :]
        write_raw(path, change(found) or found, data)

    return folder_with(rewrite)


def entry(**fields):
    return header(lambda found: found[STORED_BIAS].update(fields))


def index(change):
    def rewrite(folder):
        content = json.loads((folder / INDEX).read_text())
        (folder / INDEX).write_text(change(content) or json.dumps(content))

    return folder_with(rewrite, shards=2)


def config(text):
    return folder_with(lambda folder: (folder / "config.json").write_text(text))


def remove(name, *, shards=1):
    return folder_with(lambda folder: (folder / name).unlink(), shards=shards)


def twice(found):
    text = json.dumps(found)
    return text[:-1] + f', "{STORED_BIAS}": {json.dumps(found[STORED_BIAS])}' + "}"


def overlap(found):
    begin = found["multi_modal_projector.linear.weight"]["data_offsets"][0]
    found[STORED_BIAS]["data_offsets"] = [begin, begin + 72 * 4]


def second_copy(folder):
    write_safetensors(folder / SHARDS[1], tensors())


def lost(folder):
    path = folder / SHARDS[0]
    found = {name: np.zeros(2, np.float32) for name in list(read_header(path))[3:]}
    write_safetensors(path, found)


def two_files(*contents):
    def make(folder):
        for i, content in enumerate(contents):
            if content is not None:
                write_npz(folder / f"{i}.npz", content)
        return ",".join(str(folder / f"{i}.npz") for i in range(len(contents)))

    return make


def half(which):
    return {name: array for name, array in model().items() if name.startswith(which)}


def no_index(folder):
    (folder / INDEX).unlink()


def tensor_renamed(folder):
    found = tensors()
    write_safetensors(folder / "model.safetensors", found | {"adapter.weight": found.pop(STORED_BIAS)})


DAMAGED = r"m/model\.safetensors: its header is damaged: "
SOURCES = {
    "npz: missing": (lambda folder: folder / "w.npz", r"w\.npz: no such file"),
    "npz: cut short": (file("w.npz", lambda good: good[:-100]), r"w\.npz: not a readable npz: .*cut short"),
    "npz: empty": (file("w.npz", b""), r"w\.npz: not a readable npz: it is empty"),
    "npz: wrong magic": (file("w.npz", b"\x08" + bytes(400)), r"w\.npz: not a readable npz"),
    "npz: NaN": (npz(**{BIAS: with_number(np.nan)}), rf"w\.npz: array '{BIAS}' holds NaN or infinity"),
    "npz: infinity": (npz(**{BIAS: with_number(-np.inf, BFLOAT16)}), rf"array '{BIAS}' holds NaN or infinity"),
    "npz: of another size": (npz(**{BIAS: np.ones(3)}), r"w\.npz does not fit the model"),
    "two files: one missing": (two_files(half("img"), None), r"1\.npz: no such file"),
    "two files: an array in both": (
        two_files(model(), half("img/head")),
        r"1\.npz: has array 'img/head/(bias|kernel)', and so has one before it",
    ),
    "two files: one is bad": (two_files(half("img"), {"x/y": np.array(["text"])}), r"1\.npz: array 'x/y' holds"),
    "empty": (safetensors(lambda good: b""), r"m/model\.safetensors: not a safetensors file: it is empty"),
    "a few bytes": (safetensors(lambda good: good[:7]), r"not a safetensors file: it does not begin as one"),
    "wrong magic": (safetensors(lambda good: b"PK\3\4" + good), r"not a safetensors file: it does not begin"),
    "git lfs pointer": (safetensors(lambda good: b"version https://git-lfs..."), r"it is a Git LFS pointer"),
    "cut in the header": (safetensors(lambda good: good[:100]), r"is cut short, within its header"),
    "cut in the data": (safetensors(lambda good: good[:-100]), r"is cut short: 100 bytes are missing"),
    "header longer than the file": (
        safetensors(lambda good: (10**7).to_bytes(8, "little") + good[8:]),
        r"is cut short, within its header",
    ),
    "header is no JSON": (safetensors(lambda good: good[:8] + b"!" + good[9:]), DAMAGED),
    "header is no UTF-8": (safetensors(lambda good: good[:10] + b"\xff\xfe" + good[12:]), DAMAGED),
    "header is a list": (header(lambda found: "[1, 2]"), DAMAGED),
    "header is nested without end": (header(lambda found: '{"a":' * 100_000), DAMAGED),
    "entry is a number": (header(lambda found: found.update(x=3)), DAMAGED),
    "entry without offsets": (header(lambda found: found[STORED_BIAS].pop("data_offsets") and None), DAMAGED + "no"),
    "unknown dtype": (entry(dtype="F8_E4M3"), rf"{DAMAGED}array '{STORED_BIAS}' holds F8_E4M3, expected one of F64"),
    "shape of fractions": (entry(shape=[7.5, 9.6]), rf"{DAMAGED}array '{STORED_BIAS}' has the shape"),
    "negative shape": (entry(shape=[-8, -9]), rf"{DAMAGED}array '{STORED_BIAS}' has the shape"),
    "shape of other bytes": (entry(shape=[73]), rf"{DAMAGED}array '{STORED_BIAS}' is F32 \[73\] and has 288 bytes"),
    "offsets backwards": (entry(data_offsets=[400, 112]), rf"{DAMAGED}array '{STORED_BIAS}'"),
    "three offsets": (entry(data_offsets=[0, 100, 288]), DAMAGED),
    "overlap": (header(overlap), r"model\.safetensors: array '.*' overlaps the one before it"),
    "a name twice": (header(twice), DAMAGED + "a name is in it twice"),
    "NaN": (
        lambda folder: write_folder(folder / "m", CONFIG, tensors(bias=with_number(np.nan))),
        rf"m/model\.safetensors: array '({STORED_BIAS}|{BIAS})' holds NaN or infinity",
    ),
    "a tensor of another name": (folder_with(tensor_renamed), r"(?s)does not fit.*- multi_modal.*\+ adapter\.weight"),
    "index: a shard missing": (remove(SHARDS[1], shards=2), rf"{INDEX}: names 2 shards, of which 1 is not there"),
    "index: an array missing": (folder_with(lost, shards=2), rf"{INDEX}: array '.*' is not in {SHARDS[0]}.*1 more"),
    "index: an array in both": (folder_with(second_copy, shards=2), r"array '.*' is in another shard too"),
    "index: a shard elsewhere": (
        index(lambda content: content["weight_map"].update({STORED_BIAS: "../secret.safetensors"})),
        rf"{INDEX}: names a shard outside its folder: '\.\./secret",
    ),
    "index: no JSON": (index(lambda content: "hello"), rf"{INDEX}: expected JSON with a weight_map"),
    "index: no map": (index(lambda content: "{}"), rf"{INDEX}: expected JSON with a weight_map"),
    "index: empty map": (index(lambda content: '{"weight_map": {}}'), rf"{INDEX}: .*is empty, or names no files"),
    "index: numbers": (index(lambda content: '{"weight_map": {"a": 1}}'), rf"{INDEX}: .*names no files"),
    "shards without an index": (folder_with(no_index, shards=2), r"m: holds several safetensors files and no index"),
    "config: missing": (remove("config.json"), r"m/config\.json: no such file"),
    "config: no JSON": (config("model"), r"m/config\.json: is not JSON"),
    "config: a list": (config("[]"), r"m/config\.json: expected a JSON object, found list"),
    "config: another model's": (config('{"model_type": "llama"}'), r"m/config\.json: .*llama"),
    "config: empty": (config("{}"), r"m/config\.json: .*model_type"),
    "config: nested without end": (config('{"a":' * 100_000), r"m/config\.json: is not JSON"),
    "index: nested without end": (index(lambda content: "[" * 100_000), rf"{INDEX}: expected JSON"),
    "a folder of nothing": (lambda folder: (folder / "m").mkdir() or folder / "m", r"m: is a folder; name the \.npz"),
}  # fmt: skip
