"""Draw the demo's data: small scenes of coloured shapes, with texts that a tiny PaliGemma can learn.

A scene is one to three of twelve objects, four colours times three shapes, no object twice, none touching
another. Objects are named left to right, and their centres are far enough apart that this order is never in
doubt, so every question has one answer. Box edges lie on a grid of four pixels: the few `<loc....>` tokens in
use are each seen often.

Three tasks (`--task`):
  pretrain   `caption en`, `count circles`, `detect red square`, and `where is the red square` or
             `what is on the left`: one record of each of these four kinds for every scene
  relations  `describe en`: a long sentence about the same kind of scene. Its words are known from `pretrain`,
             the sentence is not. (A published PaliGemma knows the words of a new task, too. A word that no
             text of the pretraining has is out of reach for a fine-tuning that leaves the embedding alone.)
  tokenizer  the SentencePiece model for both, with Gemma's ids for pad, eos, bos and unk

What is held out: combinations of two or three objects, in their order from left to right, and the background,
which is light or dark. A checksum keeps every tenth such combination out of the training scenes, and the
validation scenes of two and three objects are of these alone (those of one object are only drawn anew). A
model that has learnt objects and their order, and not scenes by heart, gets them right. (To keep pairs of
objects apart altogether would make the test unfair: it is a regularity of the training texts, which a small
model learns, and then denies what it sees.)

    python tools/make_demo_data.py --task=pretrain --out=/tmp/pretrain --train=60000 --validation=300
    python tools/make_demo_data.py --task=relations --out=/tmp/relations --train=512 --validation=96
    python tools/make_demo_data.py --task=tokenizer --out=assets/tiny_tokenizer.model

Every scene is a pure function of (seed, split, index), whatever the number of workers.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import dataclasses
import functools
import io
import itertools
import json
import multiprocessing
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {"red": (214, 40, 40), "green": (40, 160, 60), "blue": (45, 85, 220), "yellow": (235, 200, 30)}
SHAPES = ("circle", "square", "triangle")
GRID = 4  # pixels
SMALLEST, LARGEST = 16 / 56, 24 / 56  # side of an object, as a share of the image's side
ORDER_GAP = 8 / 56  # least horizontal distance of two centres, as a share of the image's side
SUPERSAMPLING = 4
ATTEMPTS = 128
VOCABULARY = 1344  # 4 special, "\n", 1024 <loc....>, 128 <seg...>, 45 characters, 142 words and their parts
# In no text yet: the tokenizer, and so the tiny model's size, outlives a change of wording.
SPARE_WORDS = "there are of to above below than one two three shape shapes".split()
SPLITS = ("train", "validation", "new")
TASKS = ("pretrain", "relations")


@dataclasses.dataclass(frozen=True, order=True)
class Thing:
    """A kind of object: what a question can ask for."""

    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"


THINGS = tuple(Thing(colour, shape) for colour in COLOURS for shape in SHAPES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placed:
    """An object of a scene; its box in pixels, edges on the grid."""

    thing: Thing
    left: int
    top: int
    side: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        """y0, x0, y1, x1: PaliGemma's order."""
        return self.top, self.left, self.top + self.side, self.left + self.side

    @property
    def centre(self) -> float:
        """Where it is from left to right, in pixels."""
        return self.left + self.side / 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scene:
    """Objects from left to right, on a light or a dark background."""

    objects: tuple[Placed, ...]
    light: bool
    size: int

    @property
    def things(self) -> tuple[Thing, ...]:
        return tuple(placed.thing for placed in self.objects)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What the data depends on, and nothing else."""

    task: str
    seed: int
    size: int
    max_objects: int


# The words. Everything that is said about scenes is said here.


def caption(things: Sequence[Thing]) -> str:
    """What `caption en` answers: the objects, left to right."""
    return " and ".join(f"a {thing}" for thing in things)


def places(things: Sequence[Thing]) -> list[str]:
    """Where each object is, said in words."""
    left, middle, right = "on the left", "in the middle", "on the right"
    return {1: ["alone"], 2: [left, right], 3: [left, middle, right]}[len(things)]


def relation(things: Sequence[Thing]) -> str:
    """What `describe en` answers: the same objects, each with its place."""
    placed = [f"a {thing} {where}" for thing, where in zip(things, places(things), strict=True)]
    return f"the picture shows {' and '.join(placed)}."


def place_question(thing: Thing, where: str, *, rng: np.random.Generator) -> dict[str, str]:
    """A question for an object's place, or for what is in a place."""
    if where == "alone" or rng.random() < 0.5:
        return {"task": "place", "prefix": f"where is the {thing}", "suffix": f"it is {where}."}
    return {"task": "place", "prefix": f"what is {where}", "suffix": f"the picture shows a {thing}."}


def location(box: Sequence[int], *, size: int) -> str:
    """Four location tokens for y0 x0 y1 x1 in pixels."""
    return "".join(f"<loc{round(edge / size * 1023):04d}>" for edge in box)


def questions(scene: Scene, *, task: str, rng: np.random.Generator) -> list[dict[str, str]]:
    """The records of one scene, without its image: task, prefix, suffix."""
    if task == "relations":
        return [{"task": "caption", "prefix": "describe en", "suffix": relation(scene.things)}]
    counts = {shape: sum(thing.shape == shape for thing in scene.things) for shape in SHAPES}
    # An answer first, then a shape with that answer: asking for any shape would make most answers 0.
    answer = rng.choice(sorted(set(counts.values())))
    shape = rng.choice([shape for shape in SHAPES if counts[shape] == answer])
    wanted = scene.objects[rng.integers(len(scene.objects))]
    asked = rng.integers(len(scene.objects))
    box = location(wanted.box, size=scene.size)
    return [
        {"task": "caption", "prefix": "caption en", "suffix": caption(scene.things)},
        {"task": "count", "prefix": f"count {shape}s", "suffix": str(answer)},
        {"task": "detect", "prefix": f"detect {wanted.thing}", "suffix": f"{box} {wanted.thing}"},
        place_question(scene.things[asked], places(scene.things)[asked], rng=rng),
    ]


# The scenes.


def is_held_out(things: Sequence[Thing], *, light: bool) -> bool:
    """Whether no training scene has these objects from left to right on this background."""
    combination = " ".join(map(str, things)) + (" light" if light else " dark")
    return len(things) > 1 and zlib.crc32(combination.encode()) % 10 == 0


def draw_combination(
    rng: np.random.Generator, *, max_objects: int, held_out: bool
) -> tuple[list[Thing], bool]:
    """Which objects a scene has, from left to right, and whether its background is light."""
    number = int(rng.integers(1, max_objects + 1))
    while True:
        among = THINGS
        if rng.random() < 0.3:  # else two or three of a shape, and so the higher counts, are rare
            shape = SHAPES[rng.integers(len(SHAPES))]
            among = [thing for thing in THINGS if thing.shape == shape]
        things = [among[i] for i in rng.permutation(len(among))[:number]]
        light = bool(rng.random() < 0.5)
        if number == 1 or is_held_out(things, light=light) == held_out:
            return things, light


def place(things: Sequence[Thing], rng: np.random.Generator, *, light: bool, size: int) -> Scene:
    """A place for every object: none touches another, and their order from left to right is plain."""
    smallest, largest = round(SMALLEST * size / GRID), round(LARGEST * size / GRID)
    while True:
        # Most placements of three objects overlap: many are drawn at a time, the first that is right is used.
        sides = rng.integers(smallest, largest + 1, (ATTEMPTS, len(things))) * GRID
        # Some background at every edge of the image: hence the grid starts at 1.
        corners = rng.integers(1, (size - sides)[..., None] // GRID, (ATTEMPTS, len(things), 2)) * GRID
        (right,) = np.nonzero(_are_apart(corners, sides, size=size))
        if right.size:
            chosen = right[0]
            from_left = np.argsort(corners[chosen, :, 0] + sides[chosen] / 2)
            objects = [
                Placed(thing=thing, left=left, top=top, side=side)
                for thing, (left, top), side in zip(
                    things,
                    corners[chosen, from_left].tolist(),
                    sides[chosen, from_left].tolist(),
                    strict=True,
                )
            ]
            return Scene(objects=tuple(objects), light=light, size=size)


def draw_scene(settings: Settings, *, split: str, index: int) -> tuple[Scene, np.random.Generator]:
    """Scene `index` of a split, and the generator that goes on to draw its pixels and its questions."""
    rng = np.random.default_rng([settings.seed, TASKS.index(settings.task), SPLITS.index(split), index])
    things, light = draw_combination(rng, max_objects=settings.max_objects, held_out=split != "train")
    return place(things, rng, light=light, size=settings.size), rng


def render(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """The scene in RGB, edges smoothed, on a plain background; all slightly noisy."""
    background = (rng.integers(205, 246) if scene.light else rng.integers(10, 51)) + rng.integers(-8, 9, 3)
    picture = Image.new("RGB", (scene.size * SUPERSAMPLING,) * 2, tuple(background.tolist()))
    pen = ImageDraw.Draw(picture)
    for placed in scene.objects:
        colour = tuple((np.array(COLOURS[placed.thing.colour]) + rng.integers(-14, 15, 3)).tolist())
        top, left, bottom, right = (edge * SUPERSAMPLING for edge in placed.box)
        bottom, right = bottom - 1, right - 1  # Pillow's corners are inside
        if placed.thing.shape == "circle":
            pen.ellipse((left, top, right, bottom), fill=colour)
        elif placed.thing.shape == "square":
            pen.rectangle((left, top, right, bottom), fill=colour)
        else:
            pen.polygon(((left, bottom), ((left + right) / 2, top), (right, bottom)), fill=colour)
    pixels = np.asarray(picture.reduce(SUPERSAMPLING), np.int16)
    noise = np.rint(rng.normal(0, 3, (scene.size, scene.size, 1))).astype(np.int16)
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))


# The files.


def write_split(
    out: Path, settings: Settings, *, split: str, scenes: int, workers: int = 1
) -> list[dict[str, str]]:
    """Write a split's images and its JSONL; returns the records."""
    (out / "images" / split).mkdir(parents=True, exist_ok=True)
    write = functools.partial(_write_scene, out, settings, split)
    if workers > 1:
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
            records = list(itertools.chain.from_iterable(pool.map(write, range(scenes), chunksize=500)))
    else:
        records = [record for index in range(scenes) for record in write(index)]
    with open(out / f"{split}.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    return records


def guessing(records: Sequence[dict[str, str]]) -> dict[str, float]:
    """What the best answers that ignore the image score: a share of exact matches; for boxes the mean IoU.

    The guesses are chosen with these very records in sight: one answer for each prefix, and the mean
    box. That is more than a blind model can know.
    """
    by_task = collections.defaultdict(list)
    for record in records:
        by_task[record["task"]].append(record)
    scores = {}
    for task in ("caption", "count", "place"):
        answers = collections.defaultdict(collections.Counter)
        for record in by_task[task]:
            answers[record["prefix"]][record["suffix"]] += 1
        if answers:
            hits = sum(counter.most_common(1)[0][1] for counter in answers.values())
            scores[f"{task}_exact_match"] = hits / len(by_task[task])
    if by_task["detect"]:
        boxes = np.array([read_box(record["suffix"]) for record in by_task["detect"]])
        scores["detect_mean_iou"] = float(np.mean([iou(box, boxes.mean(axis=0)) for box in boxes]))
    return scores


def read_box(suffix: str) -> tuple[float, ...]:
    """y0, x0, y1, x1 in [0, 1] from a suffix that starts with four location tokens."""
    return tuple(int(suffix[9 * i + 4 : 9 * i + 8]) / 1023 for i in range(4))


def iou(one: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union of two boxes y0, x0, y1, x1."""
    height = max(0.0, min(one[2], other[2]) - max(one[0], other[0]))
    width = max(0.0, min(one[3], other[3]) - max(one[1], other[1]))
    area, other_area = ((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return height * width / (area + other_area - height * width)


# The tokenizer.


def corpus() -> Iterator[str]:
    """Every text of both tasks that differs in its words, location tokens left out."""
    for _ in range(20):  # prefixes are few, but each of their words must become one piece
        yield from ("caption en", "describe en")
        yield from (f"count {shape}s" for shape in SHAPES)
        yield from (f"detect {thing}" for thing in THINGS)
        yield from (f" {thing}" for thing in THINGS)
        yield from "0123"
        yield from (f" {word}" for word in SPARE_WORDS)
        yield from (f"the picture shows a {thing}." for thing in THINGS)
        yield from (f"where is the {thing}" for thing in THINGS)
        for where in ("on the left", "in the middle", "on the right", "alone"):
            yield from (f"what is {where}", f"it is {where}.")
    for number in (1, 2, 3):
        for things in itertools.permutations(THINGS, number):
            yield caption(things)
            yield relation(things)


def train_tokenizer() -> bytes:
    """A SentencePiece model: Gemma's special ids; `\\n`, location and segmentation tokens are single pieces.

    As with Gemma no space is put before a text, so that decoding gives back the very text that was encoded.
    """
    import sentencepiece  # the scenes can be drawn without it

    locations = [f"<loc{i:04d}>" for i in range(1024)]
    segments = [f"<seg{i:03d}>" for i in range(128)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=corpus(),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        user_defined_symbols=["\n", *locations, *segments],
        required_chars="abcdefghijklmnopqrstuvwxyz0123456789.,:;?!'-",
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def main(arguments: Sequence[str] | None = None) -> None:
    """Do one task, as the flags say."""
    flags = _parser().parse_args(arguments)
    out = flags.out
    if flags.task == "tokenizer":
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(train_tokenizer())
        print(f"{out}: {VOCABULARY} pieces, {out.stat().st_size} bytes")
        return

    max_objects = flags.max_objects or {"pretrain": 3, "relations": 2}[flags.task]
    settings = Settings(task=flags.task, seed=flags.seed, size=flags.size, max_objects=max_objects)
    described = dataclasses.asdict(settings) | {"train": flags.train, "validation": flags.validation}
    summary_file = out / "summary.json"
    if summary_file.exists() and json.loads(summary_file.read_text())["settings"] != described:
        sys.exit(f"{out} holds data of other settings (see {summary_file}): name another --out or delete it.")
    out.mkdir(parents=True, exist_ok=True)
    summary_file.write_text(json.dumps({"settings": described}) + "\n")  # first: claims the folder

    train = write_split(out, settings, split="train", scenes=flags.train, workers=flags.workers)
    validation = write_split(out, settings, split="validation", scenes=flags.validation)
    summary = {
        "settings": described,
        "records": {"train": len(train), "validation": len(validation)},
        "guessing": {name: round(score, 4) for name, score in guessing(validation).items()},
    }
    if flags.task == "relations":
        scene, rng = draw_scene(settings, split="new", index=0)
        render(scene, rng).save(out / "new.png")
        summary["new"] = {"image": "new.png", "prefix": "describe en", "suffix": relation(scene.things)}
    summary_file.write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary, indent=2))


def _write_scene(out: Path, settings: Settings, split: str, index: int) -> list[dict[str, str]]:
    scene, rng = draw_scene(settings, split=split, index=index)
    image = f"images/{split}/{index:06d}.png"
    render(scene, rng).save(out / image)
    return [{"image": image} | record for record in questions(scene, task=settings.task, rng=rng)]


def _are_apart(corners: np.ndarray, sides: np.ndarray, *, size: int) -> np.ndarray:
    """bool[A]: where every two objects leave a grid step between them and have a plain order.

    corners: int[A, N, 2], left and top in pixels.  sides: int[A, N].
    """
    apart = np.ones(len(sides), bool)
    far = corners + sides[..., None]
    for one, other in itertools.combinations(range(sides.shape[1]), 2):
        gaps = np.maximum(corners[:, one], corners[:, other]) - np.minimum(far[:, one], far[:, other])
        order = np.abs((corners[:, one] + far[:, one] - corners[:, other] - far[:, other])[:, 0]) / 2
        apart &= (gaps.max(axis=1) >= GRID) & (order >= ORDER_GAP * size)
    return apart


def _parser() -> argparse.ArgumentParser:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--task", choices=(*TASKS, "tokenizer"), required=True)
    parser.add_argument("--out", type=Path, required=True, help="a folder; for the tokenizer its file")
    parser.add_argument("--train", type=int, default=512, help="number of training scenes")
    parser.add_argument("--validation", type=int, default=96, help="number of held-out scenes")
    parser.add_argument("--size", type=int, choices=(56, 64), default=56, help="side of the images in pixels")
    parser.add_argument("--max_objects", type=int, choices=(2, 3), help="pretrain: 3, relations: 2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes that draw the training scenes")
    return parser


if __name__ == "__main__":
    main()
