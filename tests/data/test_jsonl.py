"""JSONL sources: what becomes a record, what a bad record, what an error at opening."""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
import pickle
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pgdist.data.jsonl import BadRecord, JsonlSource, Record, fingerprint
from pgdist.errors import DataError

GOOD = {"image": "a.png", "prefix": "caption en", "suffix": "A Red Circle"}


def only(source: JsonlSource) -> Record | BadRecord:
    assert len(source) == 1
    return source[0]


def test_a_record_holds_its_fields_where_it_stands_and_what_else_the_line_had(write_jsonl, tmp_path):
    path = write_jsonl({**GOOD, "id": 7, "boxes": [[1, 2], [3, 4]]})
    assert only(JsonlSource(path)) == Record(
        image=str(tmp_path / "a.png"),
        image_name="a.png",
        prefix="caption en",
        suffix="A Red Circle",
        suffixes=("A Red Circle",),
        extra={"id": 7, "boxes": [[1, 2], [3, 4]]},
        file=str(path),
        line=1,
    )


def test_prefix_is_overridden_or_supplied_and_suffix_lower_cased(write_jsonl):
    path = write_jsonl(GOOD, {"image": "b.png", "suffix": ["ÄB", "C"]})
    source = JsonlSource(path, prefix="describe", lowercase=True)
    assert [(one.prefix, one.suffixes) for one in source] == [
        ("describe", ("a red circle",)),
        ("describe", ("äb", "c")),
    ]
    assert source.check() == []
    assert "one prefix for all: config.data.prefix" in JsonlSource(path).check()[0].reason


def test_a_list_of_suffixes_is_kept_whole_and_its_first_is_the_suffix(write_jsonl):
    record = only(JsonlSource(write_jsonl({**GOOD, "suffix": ["one", "two"]})))
    assert (record.suffix, record.suffixes) == ("one", ("one", "two"))


def test_prompts_need_no_suffix_but_keep_one_that_is_there(write_jsonl):
    path = write_jsonl(
        {"image": "a.png", "prefix": "p"}, {"image": "a.png", "prefix": "p", "suffix": None}, GOOD
    )
    assert [one.suffix for one in JsonlSource(path, require_suffix=False)] == [None, None, "A Red Circle"]
    assert [bad.line for bad in JsonlSource(path).check()] == [1, 2]


def test_blank_lines_are_no_examples_but_count_as_lines(write_jsonl):
    line = json.dumps(GOOD)
    path = write_jsonl(b"", b"  \t ", line, "\r", "\x0c", line + "\r", "", "{", "", "")
    source = JsonlSource(path)
    assert [one.line for one in source] == [3, 6, 8]
    assert [bad.line for bad in source.check()] == [8]


def test_a_last_line_without_newline_and_a_byte_order_mark_are_read(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\n" + json.dumps(GOOD).encode())
    source = JsonlSource(path)
    assert len(source) == 2 and source.check() == []


BAD_LINES = {
    '{"image": "a.png", "prefix": "p", "suffix": }': "column 45: broken JSON",
    '{"image": "a.png"': "column 18: broken JSON",
    "nothing like it": "column 1: broken JSON",
    b'{"image": "a.png", "prefix": "caf\xe9", "suffix": "s"}': "column 34: not UTF-8 .byte 0xe9",
    "[1, 2]": "expected a JSON object, found a list: .1, 2.",
    '"text"': "expected a JSON object, found text",
    "null": "expected a JSON object, found null",
    "[" * 100_000: "nested too deep",
    '{"prefix": "p", "suffix": "s"}': "no field 'image' .fields found: prefix, suffix",
    '{"image": "a.png", "suffix": "s"}': "no field 'prefix' .fields found: image, suffix",
    '{"image": "a.png", "prefix": "p", "sufix": "s"}': "no field 'suffix' .*prefix, sufix",
    "{}": "no field 'image' .fields found: none",
    '{"image": 3, "prefix": "p", "suffix": "s"}': "field 'image': expected text, found a number: 3",
    '{"image": "a.png", "prefix": null, "suffix": "s"}': "field 'prefix': expected text, found null",
    '{"image": "a.png", "prefix": "p", "suffix": true}': "field 'suffix': expected text, found a truth value",
    '{"image": "a.png", "prefix": "p", "suffix": null}': "field 'suffix': expected text, found null",
    '{"image": "a.png", "prefix": "p", "suffix": []}': "field 'suffix': .*empty list",
    '{"image": "a.png", "prefix": "p", "suffix": ["s", {"a": 1}]}': "expected text, found an object",
    '{"image": "a.png", "prefix": "p", "suffix": "\\ud800"}': "field 'suffix': a lone surrogate .ud800",
    '{"image": "a.png", "prefix": "p", "suffix": 1' + "0" * 5000 + "}": "4300 digits|found a number",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: str(line[:60]))
def test_a_line_that_cannot_be_used_is_a_bad_record_with_its_number_and_reason(write_jsonl, line):
    path = write_jsonl(GOOD, "", line, GOOD)
    source = JsonlSource(path)
    found = source[1]
    assert isinstance(found, BadRecord)
    assert (found.file, found.line) == (str(path), 3)
    assert re.search(BAD_LINES[line], found.reason), found.reason
    assert len(found.reason) < 300
    assert source.check() == [found]
    assert [source[0].line, source[2].line] == [1, 4]


def test_image_paths_may_not_leave_the_root(write_jsonl, tmp_path):
    root = tmp_path / "root"
    (root / "in").mkdir(parents=True)
    (tmp_path / "outside.png").touch()
    (tmp_path / "root2").mkdir()
    (root / "link.png").symlink_to(tmp_path / "outside.png")
    (root / "up").symlink_to(tmp_path)
    (root / "in" / "sound.png").symlink_to(root / "real.png")
    refused = [
        "../outside.png",
        "in/../../outside.png",
        str(tmp_path / "outside.png"),
        "/etc/passwd",
        "link.png",
        "up/outside.png",
        "../root2/a.png",
        "..",
    ]
    allowed = ["real.png", "in/sound.png", "in/../real.png", str(root / "real.png"), "./in/missing.png"]
    source = JsonlSource(write_jsonl(*({**GOOD, "image": name} for name in refused + allowed)), root=root)
    found = list(source)
    for name, one in zip(refused, found, strict=False):
        assert isinstance(one, BadRecord), name
        assert f"image {name!r}: leads out of the data root {root}" in one.reason
    for name, one in zip(allowed, found[len(refused) :], strict=True):
        assert isinstance(one, Record), name
        assert one.image.startswith(f"{root}/")
    assert source.check() == []  # text only: no path is looked at


@pytest.mark.parametrize(("name", "reason"), [("", "empty text"), ("a\0.png", "NUL")])
def test_an_image_path_that_is_none_is_bad(write_jsonl, name, reason):
    assert reason in only(JsonlSource(write_jsonl({**GOOD, "image": name}))).reason


def test_a_symlinked_root_is_followed(write_jsonl, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "real")
    record = only(JsonlSource(write_jsonl(GOOD), root=tmp_path / "linked"))
    assert record.image == str(tmp_path / "real" / "a.png")


def test_the_root_may_be_the_whole_file_system(write_jsonl, tmp_path):
    assert only(JsonlSource(write_jsonl({**GOOD, "image": str(tmp_path / "a.png")}), root="/")).image_name


def test_files_that_are_no_jsonl_are_errors_at_opening(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "blank.jsonl").write_text("\n \n\n")
    (tmp_path / "utf16.jsonl").write_text(json.dumps(GOOD), encoding="utf-16")
    (tmp_path / "packed.jsonl").write_bytes(b"\x1f\x8b\x08\0")
    (tmp_path / "npz.jsonl").write_bytes(b"PK\x03\x04")
    for name, found in {
        "missing.jsonl": "found nothing",
        ".": "found a directory",
        "empty.jsonl": r"no line that is not blank \(0 bytes\)",
        "blank.jsonl": r"no line that is not blank \(4 bytes\)",
        "utf16.jsonl": "UTF-16",
        "packed.jsonl": "gzip",
        "npz.jsonl": "zip or npz",
    }.items():
        with pytest.raises(DataError, match=found) as error:
            JsonlSource(tmp_path / name)
        assert str(tmp_path) in str(error.value)
        assert error.value.exit_code == 3


def test_a_root_that_is_no_folder_is_an_error_at_opening(write_jsonl, tmp_path):
    with pytest.raises(DataError, match="image root .*nowhere.*expected a folder"):
        JsonlSource(write_jsonl(GOOD), root=tmp_path / "nowhere")


def test_a_huge_line_is_refused_without_being_read(tmp_path):
    path = tmp_path / "binary.jsonl"
    with path.open("wb") as file:
        file.write(b"x")
        file.truncate(2**33)  # sparse
    with pytest.raises(DataError, match="line 1: longer than 67,108,864 bytes"):
        JsonlSource(path)


def test_an_index_beyond_the_examples_is_an_index_error(write_jsonl):
    source = JsonlSource(write_jsonl(GOOD))
    for index in (1, 100, -1):
        with pytest.raises(IndexError):
            source[index]


def test_a_pickled_source_reads_the_same_examples(write_jsonl):
    source = JsonlSource(
        write_jsonl(GOOD, "", "{", {**GOOD, "image": "../x.png"}), prefix="p", lowercase=True
    )
    copy = pickle.loads(pickle.dumps(source))
    assert list(copy) == list(source)


def test_a_file_that_changes_between_pickling_and_reading_is_noticed(write_jsonl):
    path = write_jsonl(GOOD, GOOD)
    content = pickle.dumps(JsonlSource(path))
    path.write_text(json.dumps(GOOD) + "\n")
    with pytest.raises(DataError, match="changed while it was in use"):
        pickle.loads(content)


def test_a_replaced_file_does_not_disturb_a_source_that_is_open(write_jsonl, tmp_path):
    path = write_jsonl(GOOD, GOOD)
    source = JsonlSource(path)
    before = list(source)
    (tmp_path / "new").write_text("other\n")
    os.replace(tmp_path / "new", path)
    assert list(source) == before


def test_threads_read_the_same_as_one(write_jsonl):
    source = JsonlSource(write_jsonl(*({**GOOD, "suffix": f"{i}" * (i % 50 + 1)} for i in range(300))))
    expected = list(source)
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        for _ in range(3):
            assert list(pool.map(source.__getitem__, range(300))) == expected


def test_no_descriptor_is_left_open(write_jsonl):
    path = write_jsonl(GOOD)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        assert only(JsonlSource(path))
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_fingerprint_is_the_number_of_examples_and_the_content(write_jsonl):
    path = write_jsonl(GOOD, "", GOOD)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert fingerprint(JsonlSource(path)) == f"2 examples, sha256 {sha256}"
    assert fingerprint(JsonlSource(path)) == fingerprint(
        JsonlSource(write_jsonl(GOOD, "", GOOD, name="copy.jsonl"))
    )
    assert fingerprint(JsonlSource(path)) != fingerprint(
        JsonlSource(write_jsonl(GOOD, GOOD, name="other.jsonl"))
    )


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=st.lists(
        st.sampled_from(["", " ", "\t", "\r", "{", "[]", "null", "\x85", "\u2028"])
        | st.fixed_dictionaries(
            {"image": st.text(), "prefix": st.text(), "suffix": st.text() | st.lists(st.text())}
        )
        | st.binary(max_size=30).filter(lambda line: b"\n" not in line),
        max_size=12,
    )
)
def test_examples_are_the_lines_of_the_file_that_are_not_blank(write_jsonl, lines):
    path = write_jsonl(*lines)
    content = path.read_bytes().split(b"\n")[:-1]
    numbers = [number for number, line in enumerate(content, 1) if line and not line.isspace()]
    try:
        source = JsonlSource(path)
    except DataError:
        other_formats = (b"\xff\xfe", b"\xfe\xff", b"\x1f\x8b", b"PK\x03\x04")
        assert not numbers or content[0].startswith(other_formats)
        return
    assert [one.line for one in source] == numbers
    for one in source:
        if isinstance(one, Record):
            fields = json.loads(content[one.line - 1])
            assert (one.image_name, one.prefix) == (fields["image"], fields["prefix"])
            assert list(one.suffixes) in (fields["suffix"], [fields["suffix"]])
            assert one.image.startswith(source.root)
