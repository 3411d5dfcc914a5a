"""The demo's data: the same every time, one right answer to each question, held-out scenes truly held out."""

from __future__ import annotations

import collections
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from PIL import Image

from tools import make_demo_data as demo

TOKENIZER = Path(__file__).resolve().parents[2] / "assets" / "tiny_tokenizer.model"
SCENES = 200


def settings(task: str = "pretrain", *, size: int = 56, max_objects: int = 3, seed: int = 0) -> demo.Settings:
    return demo.Settings(task=task, seed=seed, size=size, max_objects=max_objects)


def scenes(split: str, **kwargs) -> list[demo.Scene]:
    return [demo.draw_scene(settings(**kwargs), split=split, index=index)[0] for index in range(SCENES)]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def tokenizer() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(TOKENIZER))


@pytest.mark.parametrize("task", demo.TASKS)
def test_same_seed_writes_the_same_files_with_any_number_of_workers(tmp_path: Path, task: str):
    for name, workers, seed in (("one", 1, 0), ("two", 2, 0), ("other", 1, 1)):
        demo.main(
            [f"--task={task}", f"--out={tmp_path / name}", "--train=20", "--validation=6"]
            + [f"--workers={workers}", f"--seed={seed}"]
        )
    one, two, other = (files(tmp_path / name) for name in ("one", "two", "other"))
    assert one == two
    assert one.keys() == other.keys() and one["train.jsonl"] != other["train.jsonl"]


def test_a_tenth_is_held_out_and_no_single_object():
    for number in (2, 3):
        answers = [
            demo.is_held_out(things, light=light)
            for things in itertools.permutations(demo.THINGS, number)
            for light in (False, True)
        ]
        assert 0.06 < sum(answers) / len(answers) < 0.14
    assert not any(demo.is_held_out([thing], light=light) for thing in demo.THINGS for light in (False, True))


def test_every_pair_of_objects_is_in_training_in_some_order_and_on_some_background():
    for one, other in itertools.combinations(demo.THINGS, 2):
        orders = ([one, other], [other, one])
        assert not all(demo.is_held_out(things, light=light) for things in orders for light in (False, True))


@pytest.mark.parametrize("task", demo.TASKS)
@pytest.mark.parametrize("max_objects", [2, 3])
def test_held_out_combinations_are_the_validation_scenes_and_no_training_scene(task: str, max_objects: int):
    train = scenes("train", task=task, max_objects=max_objects)
    assert not any(demo.is_held_out(scene.things, light=scene.light) for scene in train)
    assert {thing for scene in train for thing in scene.things} == set(demo.THINGS)
    validation = scenes("validation", task=task, max_objects=max_objects)
    assert all(
        demo.is_held_out(scene.things, light=scene.light) for scene in validation if len(scene.things) > 1
    )
    assert {len(scene.things) for scene in validation} == set(range(1, max_objects + 1))


def test_records_on_disk_keep_what_is_held_out_apart(tmp_path: Path):
    demo.main(["--task=pretrain", f"--out={tmp_path}", "--train=150", "--validation=30", "--workers=1"])
    for split, held_out in (("train", False), ("validation", True)):
        records = [json.loads(line) for line in (tmp_path / f"{split}.jsonl").read_text().splitlines()]
        assert {record["task"] for record in records} == {"caption", "count", "detect", "place"}
        for record in records:
            image = Image.open(tmp_path / record["image"])
            assert image.size == (56, 56)
            if record["task"] == "caption":
                things = [demo.Thing(*words) for words in re.findall(r"a (\w+) (\w+)", record["suffix"])]
                light = np.asarray(image)[0].mean() > 128  # no object touches the edge
                assert len(things) == 1 or demo.is_held_out(things, light=light) == held_out


@pytest.mark.parametrize("size", [56, 64])
def test_no_object_is_twice_in_a_scene_and_left_to_right_is_never_in_doubt(size: int):
    for scene in scenes("train", size=size) + scenes("validation", size=size):
        assert len(set(scene.things)) == len(scene.things)
        centres = [placed.centre for placed in scene.objects]
        assert all(right - left >= 8 * size / 56 for left, right in itertools.pairwise(centres))
        for one, other in itertools.combinations(scene.objects, 2):
            assert demo.iou(one.box, other.box) == 0
        assert all(0 < edge < size for placed in scene.objects for edge in placed.box)


def test_every_question_has_the_one_answer_that_the_scene_gives():
    answers = collections.Counter()
    for index in range(SCENES):
        scene, rng = demo.draw_scene(settings(), split="train", index=index)
        caption, count, detect, place = demo.questions(scene, task="pretrain", rng=rng)
        assert caption["suffix"] == " and ".join(f"a {thing}" for thing in scene.things)

        shape = count["prefix"].removeprefix("count ").removesuffix("s")
        assert count["suffix"] == str([thing.shape for thing in scene.things].count(shape))
        answers[count["suffix"]] += 1

        asked = demo.Thing(*detect["prefix"].removeprefix("detect ").split())
        (wanted,) = [placed for placed in scene.objects if placed.thing == asked]
        assert re.fullmatch(rf"(<loc\d{{4}}>){{4}} {asked}", detect["suffix"])
        expected = np.array(wanted.box) / scene.size
        assert np.allclose(demo.read_box(detect["suffix"]), expected, atol=0.5 / 1023)

        whereabouts = dict(zip(map(str, scene.things), demo.places(scene.things), strict=True))
        assert len(set(whereabouts.values())) == len(scene.things)
        if place["prefix"].startswith("where is the "):
            assert place["suffix"] == f"it is {whereabouts[place['prefix'].removeprefix('where is the ')]}."
        else:
            thing = place["suffix"].removeprefix("the picture shows a ").removesuffix(".")
            assert place["prefix"] == f"what is {whereabouts[thing]}"
    assert set(answers) == {"0", "1", "2", "3"}


def test_relations_say_where_each_object_is():
    red_square, blue_circle, green_square = (
        demo.Thing(*words.split()) for words in ("red square", "blue circle", "green square")
    )
    assert demo.relation([red_square]) == "the picture shows a red square alone."
    assert demo.relation([red_square, blue_circle]) == (
        "the picture shows a red square on the left and a blue circle on the right."
    )
    assert demo.relation([red_square, blue_circle, green_square]) == (
        "the picture shows a red square on the left and a blue circle in the middle"
        " and a green square on the right."
    )


def test_relations_are_sentences_that_pretraining_never_said_in_words_that_it_did():
    sentences, relations = set(), set()
    for task, texts in (("pretrain", sentences), ("relations", relations)):
        for index in range(SCENES):
            scene, rng = demo.draw_scene(settings(task), split="train", index=index)
            for question in demo.questions(scene, task=task, rng=rng):
                texts.add(question["suffix"])
    said = {word for text in sentences for word in re.findall(r"\w+|[.]", text)}
    assert {word for text in relations for word in re.findall(r"\w+|[.]", text)} <= said
    assert not relations & sentences


def drawn_box(image: Image.Image, placed: demo.Placed) -> tuple[int, ...]:
    """The box of the pixels nearer to the object's colour than to the background's, y0 x0 y1 x1."""
    pixels = np.asarray(image, float)
    background = np.median(pixels.reshape(-1, 3), axis=0)
    colour = pixels[placed.top + placed.side * 2 // 3, placed.left + placed.side // 2]
    share = (pixels - background) @ (colour - background) / np.sum((colour - background) ** 2)
    rows, columns = np.nonzero(share > 0.2)
    return rows.min(), columns.min(), rows.max() + 1, columns.max() + 1


@pytest.mark.parametrize("shape", demo.SHAPES)
@pytest.mark.parametrize("size", [56, 64])
def test_boxes_match_the_drawn_pixels(size: int, shape: str):
    rng = np.random.default_rng(0)
    for colour in demo.COLOURS:
        for _ in range(5):
            light = bool(rng.random() < 0.5)
            scene = demo.place([demo.Thing(colour, shape)], rng, light=light, size=size)
            image = demo.render(scene, rng)
            assert image.size == (size, size) and image.mode == "RGB"
            assert demo.iou(drawn_box(image, scene.objects[0]), scene.objects[0].box) >= 0.9


def test_guessing_counts_the_best_answers_that_ignore_the_image():
    def record(task: str, prefix: str, suffix: str) -> dict[str, str]:
        return {"task": task, "prefix": prefix, "suffix": suffix}

    box = demo.location((0, 0, 28, 28), size=56)
    scores = demo.guessing(
        [record("caption", "caption en", suffix) for suffix in ("a", "a", "b", "c")]
        + [record("count", "count circles", suffix) for suffix in "110"]
        + [record("count", "count squares", "2")]
        + [record("detect", "detect red square", f"{box} red square")] * 2
    )
    assert scores == {"caption_exact_match": 0.5, "count_exact_match": 0.75, "detect_mean_iou": 1.0}


def test_data_of_other_settings_is_not_overwritten(tmp_path: Path):
    arguments = ["--task=relations", f"--out={tmp_path}", "--validation=2", "--workers=1"]
    demo.main([*arguments, "--train=3"])
    before = files(tmp_path)
    with pytest.raises(SystemExit, match="other settings"):
        demo.main([*arguments, "--train=4"])
    assert files(tmp_path) == before


def test_tokenizer_has_the_special_ids_of_gemma(tokenizer):
    assert (tokenizer.pad_id(), tokenizer.eos_id(), tokenizer.bos_id(), tokenizer.unk_id()) == (0, 1, 2, 3)
    assert tokenizer.vocab_size() == demo.VOCABULARY
    for piece in ("\n", "<loc0000>", "<loc1023>", "<seg000>", "<seg127>", *"0123"):
        assert tokenizer.decode(tokenizer.encode(piece)) == piece
        assert len(tokenizer.encode(piece)) == 1
    locations = [tokenizer.piece_to_id(f"<loc{i:04d}>") for i in range(1024)]
    assert locations == list(range(locations[0], locations[0] + 1024))
    assert tokenizer.piece_to_id("<seg000>") == locations[-1] + 1


def test_every_text_comes_back_from_the_tokenizer_and_every_word_is_one_piece(tokenizer):
    texts = set(demo.corpus())
    for task, split in itertools.product(demo.TASKS, ("train", "validation")):
        for index in range(SCENES):
            scene, rng = demo.draw_scene(settings(task), split=split, index=index)
            for question in demo.questions(scene, task=task, rng=rng):
                texts.update((question["prefix"], question["suffix"]))
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.unk_id() not in ids
        assert tokenizer.decode(ids) == text
        assert len(ids) == len(re.findall(r"<loc\d{4}>|\w+|[.,:]", text)), text


def test_texts_of_other_people_do_not_crash_the_tokenizer(tokenizer):
    assert tokenizer.decode(tokenizer.encode("how many zebras,\nplease?")) == "how many zebras,\nplease?"
    assert tokenizer.unk_id() in tokenizer.encode("Ünknown Letters 漢字")


def test_checked_in_tokenizer_is_what_the_script_trains():
    trained = sentencepiece.SentencePieceProcessor(model_proto=demo.train_tokenizer())
    kept = sentencepiece.SentencePieceProcessor(model_file=str(TOKENIZER))
    assert [trained.id_to_piece(i) for i in range(trained.vocab_size())] == [
        kept.id_to_piece(i) for i in range(kept.vocab_size())
    ]
