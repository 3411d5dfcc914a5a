"""The table of pictures and texts that notebooks show."""

from __future__ import annotations

import pytest

from pgdist.data.images import BadImage
from pgdist.report import picture_table
from tests.report.conftest import draw_scene


@pytest.fixture
def images(tmp_path) -> list[str]:
    paths = [tmp_path / f"{index}.png" for index in range(2)]
    for index, path in enumerate(paths):
        draw_scene(index).save(path)
    return [str(path) for path in paths]


def test_each_image_has_its_texts_in_its_row(images):
    html = picture_table(images, {"truth": ["a", "b"], "step 0": ["c", "d"]})._repr_html_()
    header, first, second = html.split("<tr>")[1:]
    assert header.index("truth") < header.index("step 0")
    assert ">a</td>" in first and ">c</td>" in first and ">b</td>" in second and ">d</td>" in second
    assert first.count('src="data:image/png;base64,') == second.count('src="data:image/png;base64,') == 1
    assert first.split("src=")[1].split(">")[0] != second.split("src=")[1].split(">")[0]


def test_pictures_alone_are_a_table_too(images):
    assert picture_table(images, {}).html.count("<img") == 2


def test_texts_are_no_markup(images):
    html = picture_table(images, {"<b>": ["<script>alert(1)</script>", '<loc0001> & "x"']}).html
    assert "<script>" not in html and "<b>" not in html
    assert "&lt;loc0001&gt; &amp;" in html


def test_its_repr_which_notebooks_keep_beside_the_html_holds_no_pixels(images):
    assert "base64" not in repr(picture_table(images, {}))


def test_a_column_that_does_not_fit_or_an_image_that_is_none_is_an_error(images, tmp_path):
    with pytest.raises(ValueError):
        picture_table(images, {"caption": ["one"]})
    with pytest.raises(BadImage, match="no such file"):
        picture_table([tmp_path / "nothing.png"], {"caption": ["one"]})
