"""The loader: the same rows for all hosts, workers and starting steps; masked rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pgdist.data.jsonl import BadRecord, JsonlSource, Record
from pgdist.data.loader import evaluation_batches, train_batches
from pgdist.data.order import ExampleOrder
from pgdist.data.text import encode_example, prompt_bucket, prompt_ids
from tests.data.pictures import colour

LENGTH = 24
SIZE = 8
FIELDS = {"image", "text", "mask_ar", "mask_loss", "mask_input", "weight", "truncated", "index"}


@pytest.fixture
def train(tokenizer):
    """train_batches with the tests' defaults, read to the end."""

    def read(source, **options):
        options = {"seed": 3, "batch_size": 8, "rows": range(8), "start_step": 0, "num_steps": 6, **options}
        batches = train_batches(
            source=source, tokenizer=tokenizer, image_size=SIZE, text_length=LENGTH, **options
        )
        with batches:
            return list(batches)

    return read


@pytest.fixture
def evaluate(tokenizer):
    """evaluation_batches with the tests' defaults, read to the end."""

    def read(source, length=LENGTH, **options):
        options = {"batch_size": 8, "rows": range(8), **options}
        batches = evaluation_batches(
            source=source, tokenizer=tokenizer, image_size=SIZE, text_length=length, **options
        )
        with batches:
            return list(batches)

    return read


def assert_same_rows(found, expected, rows) -> None:
    """The batches `found` are the `rows` of the global batches `expected`."""
    rows = list(rows)
    assert [batch.step for batch in found] == [batch.step for batch in expected]
    for one, whole in zip(found, expected, strict=True):
        assert one.records == tuple(whole.records[row] for row in rows)
        assert one.bad == tuple(one for one in one.records if isinstance(one, BadRecord))
        for name in FIELDS:
            np.testing.assert_array_equal(one.arrays[name], whole.arrays[name][rows])


def test_a_batch_holds_the_examples_of_the_order_as_the_model_reads_them(make_source, train, tokenizer):
    source = make_source(20)
    order = ExampleOrder(20, 3)
    batches = train(source, start_step=5, num_steps=4)
    assert [batch.step for batch in batches] == [5, 6, 7, 8]
    for batch in batches:
        arrays = batch.arrays
        assert set(arrays) == FIELDS
        assert arrays["image"].shape == (8, SIZE, SIZE, 3) and arrays["image"].dtype == np.uint8
        for name in ("text", "mask_ar", "mask_loss", "mask_input"):
            assert arrays[name].shape == (8, LENGTH) and arrays[name].dtype == np.int32
        assert arrays["weight"].dtype == np.float32 and arrays["weight"].tolist() == [1] * 8
        assert arrays["index"].dtype == np.int64
        np.testing.assert_array_equal(arrays["index"], order.ids(batch.step, 8))
        for row, index in enumerate(arrays["index"].tolist()):
            assert (arrays["image"][row] == colour(index)).all()
            text = encode_example(
                tokenizer, prefix=f"caption en {index}", suffix=f"red circle {index}", length=LENGTH
            )
            for name in ("text", "mask_ar", "mask_loss", "mask_input"):
                np.testing.assert_array_equal(arrays[name][row], getattr(text, name))
            assert batch.records[row] == source[index]
        assert batch.bad == () and not batch.arrays["truncated"].any()


def test_a_prompt_that_does_not_fit_is_a_bad_record_and_not_cut(make_source, evaluate):
    long = {"image": "0.png", "prefix": "red circle " * 40, "suffix": "s"}
    [batch] = evaluate(make_source(4, bad={2: long}), batch_size=4, rows=range(4), prompt_only=True)
    assert batch.arrays["weight"].tolist() == [1, 1, 0, 1]
    assert [(record.line, record.reason) for record in batch.bad] == [
        (3, f"the prompt is longer than {LENGTH} tokens (data.text_length, or --max_prompt_tokens)")
    ]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_split_over_hosts_from_any_step_gives_the_same_global_batches(make_source, train, data):
    n = data.draw(st.integers(1, 30), label="n")
    bad = dict.fromkeys(data.draw(st.sets(st.integers(0, n - 1), max_size=3), label="bad"), "{broken")
    batch_size = data.draw(st.integers(1, 8), label="batch_size")
    start = data.draw(st.integers(0, 5), label="start")
    places = data.draw(st.permutations(range(batch_size)), label="places")
    cuts = sorted(data.draw(st.sets(st.integers(1, batch_size), max_size=3), label="cuts"))
    hosts = [part.tolist() for part in np.split(np.array(places), cuts) if len(part)]
    source = make_source(n, bad=bad, suffixes=3)
    whole = train(source, batch_size=batch_size, rows=range(batch_size), num_steps=6)
    for rows in hosts:
        found = train(source, batch_size=batch_size, rows=rows, start_step=start, num_steps=6 - start)
        assert_same_rows(found, whole[start:], rows)


@pytest.mark.parametrize(
    ("hosts", "start"), [(1, 0), (2, 3), (4, 5)], ids=["1-host", "2-hosts-resumed", "4-hosts-resumed"]
)
def test_worker_processes_give_the_same_rows_as_threads(make_source, train, hosts, start):
    source = make_source(
        13, bad={4: "{broken", 7: {"image": "gone.png", "prefix": "p", "suffix": "s"}}, suffixes=3
    )
    whole = train(source, num_steps=7)
    per_host = 8 // hosts
    for host in sorted({0, hosts - 1}):
        rows = range(host * per_host, (host + 1) * per_host)
        found = train(source, rows=rows, start_step=start, num_steps=7 - start, workers=2)
        assert_same_rows(found, whole[start:], rows)


def test_more_workers_than_rows_is_fine(make_source, train, evaluate):
    source = make_source(3)
    assert_same_rows(
        train(source, batch_size=1, rows=[0], num_steps=1, workers=3),
        train(source, batch_size=1, rows=[0], num_steps=1),
        [0],
    )


def test_no_steps_give_no_batches(make_source, train):
    assert train(make_source(3), num_steps=0) == []


def test_a_suffix_is_drawn_by_the_seed_and_the_global_row(make_source, train):
    source = make_source(4, suffixes=5)
    drawn = [record.suffix for batch in train(source, num_steps=10) for record in batch.records]
    order = ExampleOrder(4, 3)
    expected = [source[order.example(row)].suffixes[order.choose(row, 5)] for row in range(80)]
    assert drawn == expected
    of_one_example = {suffix for suffix in drawn if suffix.startswith("red circle 0 ")}
    assert len(of_one_example) > 2


def test_another_seed_gives_another_order(make_source, train):
    source = make_source(50)
    one, other = (train(source, seed=seed, num_steps=1)[0].arrays["index"].tolist() for seed in (1, 2))
    assert one != other


BAD = {
    1: "{broken",
    3: {"image": "3.png", "prefix": "p"},
    5: {"image": "../5.png", "prefix": "p", "suffix": "s"},
    7: {"image": "gone.png", "prefix": "p", "suffix": "s"},
    8: {"image": "cut.jpg", "prefix": "p", "suffix": "s"},
}


def test_a_bad_record_becomes_a_masked_row_in_its_place(make_source, train, evaluate, tmp_path):
    (tmp_path / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0\0\x10JFIF")
    source, sound = make_source(10, bad=BAD), None
    reasons = {
        1: "broken JSON",
        3: "no field 'suffix'",
        5: "leads out",
        7: "'gone.png': no such",
        8: "'cut.jpg': ",
    }
    found = evaluate(source) + train(source, num_steps=5)
    sound = evaluate(make_source(10)) + train(make_source(10), num_steps=5)
    for batch, whole in zip(found, sound, strict=True):
        arrays = batch.arrays
        np.testing.assert_array_equal(arrays["index"], whole.arrays["index"])
        for row, index in enumerate(arrays["index"].tolist()):
            if index in BAD:
                assert reasons[index] in batch.records[row].reason
                assert batch.records[row].line == index + 1
                assert arrays["weight"][row] == 0
                assert not arrays["image"][row].any() and not arrays["text"][row].any()
                assert not arrays["mask_ar"][row].any() and not arrays["mask_loss"][row].any()
                assert arrays["mask_input"][row].tolist() == [1] + [0] * (LENGTH - 1)
            else:
                for name in FIELDS:
                    np.testing.assert_array_equal(arrays[name][row], whole.arrays[name][row])
        assert batch.bad == tuple(record for record in batch.records if isinstance(record, BadRecord))


def test_a_source_of_nothing_but_bad_records_still_gives_full_batches(make_source, train):
    batches = train(make_source(3, bad=dict.fromkeys(range(3), "[]")), num_steps=2)
    assert [batch.arrays["weight"].sum() for batch in batches] == [0, 0]
    assert [len(batch.bad) for batch in batches] == [8, 8]


def test_truncated_texts_are_counted(make_source, train, tokenizer):
    long = {"image": "0.png", "prefix": "p", "suffix": "red circle " * 40}
    source = make_source(4, bad={0: long, 2: long})
    [batch] = train(source, num_steps=1)
    assert batch.arrays["truncated"].sum() == 4  # two of four examples, twice in eight rows
    assert batch.arrays["weight"].tolist() == [1] * 8


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(1, 20), batch_size=st.integers(1, 9), limit=st.none() | st.integers(1, 25), data=st.data()
)
def test_evaluation_sees_every_example_once_and_pads_the_tail(
    make_source, evaluate, n, batch_size, limit, data
):
    source = make_source(n)
    count = n if limit is None else min(n, limit)
    whole = evaluate(source, batch_size=batch_size, rows=range(batch_size), limit=limit)
    assert len(whole) == -(-count // batch_size)
    index = np.concatenate([batch.arrays["index"] for batch in whole])
    weight = np.concatenate([batch.arrays["weight"] for batch in whole])
    records = [record for batch in whole for record in batch.records]
    padding = len(whole) * batch_size - count
    assert index.tolist() == list(range(count)) + [-1] * padding
    assert weight.tolist() == [1] * count + [0] * padding
    assert records == [source[i] for i in range(count)] + [None] * padding
    assert not any(batch.bad or batch.arrays["truncated"].any() for batch in whole)
    for part in np.array_split(np.array(data.draw(st.permutations(range(batch_size)))), 3):
        if len(part):
            found = evaluate(source, batch_size=batch_size, rows=part.tolist(), limit=limit)
            assert_same_rows(found, whole, part)


def test_evaluation_with_workers_sees_the_same_tail(make_source, evaluate):
    source = make_source(11, bad={2: "{"})
    whole = evaluate(source, batch_size=4, rows=range(4))
    for rows in ([0, 1], [3]):
        assert_same_rows(evaluate(source, batch_size=4, rows=rows, workers=2), whole, rows)


def test_evaluation_encodes_the_first_suffix_or_the_prompt_alone(make_source, evaluate, tokenizer):
    source = make_source(5, suffixes=3)
    [whole] = evaluate(source)
    [prompts] = evaluate(source, prompt_only=True)
    bucket = 16
    assert prompts.arrays["text"].shape == (8, bucket)
    for i in range(5):
        for batch, suffix, length in ((whole, f"red circle {i} 0", LENGTH), (prompts, None, bucket)):
            text = encode_example(tokenizer, prefix=f"caption en {i}", suffix=suffix, length=length)
            for name in ("text", "mask_ar", "mask_loss", "mask_input"):
                np.testing.assert_array_equal(batch.arrays[name][i], getattr(text, name))
        assert prompts.records[i].suffixes == (f"red circle {i} 0", f"red circle {i} 1", f"red circle {i} 2")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_all_hosts_pad_a_batch_to_its_longest_prompt_whoever_holds_it(make_source, evaluate, tokenizer, data):
    limit, n = 100, 13
    bad = data.draw(
        st.dictionaries(st.integers(0, n - 1), st.sampled_from(["{broken", '{"image": "0.png"}']))
    )
    # The last ones do not fit.
    words = data.draw(st.lists(st.sampled_from([0, 1, 6, 12, 25, 40, 80]), min_size=n, max_size=n))
    images = [f"{i}.png" if data.draw(st.booleans()) else "gone.png" for i in range(n)]
    lines = {
        i: {"image": images[i], "prefix": " ".join(["circle"] * words[i]), "suffix": "s"} for i in range(n)
    }
    source = make_source(n, bad=lines | bad)
    options = {"batch_size": 4, "limit": data.draw(st.integers(9, n)), "prompt_only": True}

    whole = evaluate(source, rows=range(4), length=limit, **options)

    for batch in whole:
        examples = [i for i in batch.arrays["index"].tolist() if i >= 0 and i not in bad]
        lengths = [len(prompt_ids(tokenizer, lines[i]["prefix"])) for i in examples]
        longest = max((length for length in lengths if length <= limit), default=1)
        assert batch.arrays["text"].shape == (4, prompt_bucket(longest, limit=limit))
    cuts = sorted(data.draw(st.sets(st.integers(1, 4), max_size=3), label="cuts"))
    for rows in np.split(np.array(data.draw(st.permutations(range(4)))), cuts):
        if len(rows):
            found = evaluate(source, rows=rows.tolist(), length=limit, **options)
            assert_same_rows(found, whole, rows)


def test_a_batch_of_nothing_but_bad_records_has_the_shortest_prompts(make_source, evaluate):
    long = {"image": "0.png", "prefix": "red circle " * 40, "suffix": "s"}
    [batch] = evaluate(make_source(2, bad={0: "{broken", 1: long}), prompt_only=True)
    assert batch.arrays["text"].shape == (8, 16)
    assert batch.arrays["mask_input"].sum(axis=1).tolist() == [1] * 8
    assert not batch.arrays["weight"].any()


def test_worker_processes_find_the_same_prompts(make_source, evaluate):
    long = {"image": "0.png", "prefix": "red circle " * 8, "suffix": "s"}
    source = make_source(11, bad={2: "{", 6: long})
    whole = evaluate(source, batch_size=4, rows=range(4), prompt_only=True)
    assert [batch.arrays["text"].shape[1] for batch in whole] == [16, LENGTH, 16]
    found = evaluate(source, batch_size=4, rows=[0, 3], prompt_only=True, workers=2)
    assert_same_rows(found, whole, [0, 3])


def test_the_prompt_of_an_image_that_leads_out_of_its_folder_counts_everywhere(make_source):
    source = make_source(3, bad={1: {"image": "../1.png", "prefix": "p", "suffix": "s"}, 2: "{broken"})
    assert [source.prefix_of(i) for i in range(3)] == ["caption en 0", "p", None]
    assert isinstance(source[1], BadRecord)


class Records(list):
    def prefix_of(self, index):
        return self[index].prefix


def test_any_sequence_of_records_that_gives_their_prefixes_is_a_source(make_source, evaluate):
    made = make_source(2)[1]
    prompt = Record(
        image=made.image, image_name="x", prefix="p", suffix=None, suffixes=(), extra={}, file="argv", line=1
    )
    [batch] = evaluate(Records([prompt]), batch_size=2, rows=[0, 1], prompt_only=True)
    assert batch.records == (prompt, None)
    assert (batch.arrays["image"][0] == colour(1)).all()


@pytest.mark.parametrize("rows", [[], [8], [-1], [0, 1, 9]])
def test_rows_that_the_batch_does_not_have_are_refused(make_source, train, rows):
    with pytest.raises(ValueError, match="rows: expected some of the positions 0 to 7"):
        train(make_source(3), rows=rows)


def test_an_error_of_the_source_reaches_the_reader(make_source, train):
    source = make_source(10)

    class Broken(JsonlSource):
        def __getitem__(self, index):
            raise OSError("the disk is on fire")

    source.__class__ = Broken
    with pytest.raises(OSError, match="the disk is on fire"):
        train(source)
