import base64
import re
import struct
import sys
import zlib
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest

from merganser.errors import MerganserError, ParameterError
from merganser.report import _apart, accuracy_curve_png, figure_html, html_page, layers_png, matrix_png, table_html

CURVES = {"gram": [95.0, 91.0, 88.0], "opcm": [95.0, 80.0, 71.0]}
NAMES = ["a", "b", "c"]
SQUARE = [[95.0, 30.0, 20.0], [90.0, 92.0, 25.0], [88.0, 87.0, 91.0]]


def png_size(png: bytes) -> tuple[int, int]:
    """Width and height, after a check of the signature and of every chunk's checksum."""
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    at, kinds = 8, []
    while at < len(png):
        length, kind = struct.unpack(">I4s", png[at : at + 8])
        (checksum,) = struct.unpack(">I", png[at + 8 + length : at + 12 + length])
        assert checksum == zlib.crc32(png[at + 4 : at + 8 + length])
        kinds.append(kind)
        at += 12 + length
    assert kinds[0] == b"IHDR"
    assert kinds[-1] == b"IEND"
    width, height = struct.unpack(">II", png[16:24])
    return width, height


class Audit(HTMLParser):
    """Collects what a page refers to and checks that elements close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.text = ""
        self._open: list[str] = []

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append(tag)
        self.references += [value for name, value in attrs if name in {"src", "href", "srcset", "data", "action"}]
        if tag not in {"meta", "img", "br"}:
            self._open.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data) -> None:
        self.text += data


@pytest.fixture(scope="module")
def page() -> str:
    curve = figure_html(accuracy_curve_png(CURVES, references={"experts": 97.5}), alt="curve", caption="a < b")
    matrix = figure_html(matrix_png(SQUARE, row_labels=NAMES, column_labels=NAMES, staircase=True), alt="R")
    table = table_html(["method", "ACC"], [["gram", "88.0"], ["opcm", "71.0"]], strong_row=0)
    return html_page("Merging & more", [("Curve", curve), ("R", matrix), ("Table", table)], lead="One <state>.")


@pytest.fixture(scope="module")
def audit(page) -> Audit:
    audit = Audit()
    audit.feed(page)
    audit.close()
    return audit


def test_a_page_loads_nothing(page, audit) -> None:
    assert audit.references
    assert all(reference.startswith("data:image/png;base64,") for reference in audit.references)
    assert not {"script", "link", "iframe", "object", "base"} & set(audit.tags)
    assert "http" not in page
    assert "@import" not in page
    assert "url(" not in page


def test_every_image_of_a_page_decodes_as_png(audit) -> None:
    assert len(audit.references) == 2
    for reference in audit.references:
        width, height = png_size(base64.b64decode(reference.split(",", 1)[1], validate=True))
        assert min(width, height) > 300


def test_every_image_of_a_page_has_a_description(page) -> None:
    assert len(re.findall(r'<img alt="[^"]+"', page)) == page.count("<img") == 2


def test_plain_text_of_a_page_is_escaped(audit) -> None:
    for words in ("Merging & more", "One <state>.", "a < b"):
        assert words in audit.text
    assert "state" not in audit.tags


def test_a_page_fits_a_phone(page) -> None:
    assert 'name="viewport" content="width=device-width' in page
    assert '<div class="scroll"><table>' in page
    assert "tabular-nums" in page


def test_sections_keep_their_order(page) -> None:
    assert page.index("<h2>Curve") < page.index("<h2>R<") < page.index("<h2>Table")


def test_one_merge_can_be_drawn() -> None:
    png_size(accuracy_curve_png({"gram": [90.0]}))


def test_drawing_twice_gives_the_same_bytes() -> None:
    assert accuracy_curve_png(CURVES) == accuracy_curve_png(CURVES)


def test_a_matrix_with_holes_can_be_drawn() -> None:
    holes = np.where(np.tri(3, dtype=bool), SQUARE, np.nan)
    png_size(matrix_png(holes, row_labels=NAMES, column_labels=NAMES))


def test_drawing_leaves_the_matrix_as_it_was() -> None:
    values = np.array(SQUARE)
    matrix_png(values, row_labels=NAMES, column_labels=NAMES)
    np.testing.assert_array_equal(values, SQUARE)


def test_no_curve_is_refused() -> None:
    with pytest.raises(ParameterError, match="at least one"):
        accuracy_curve_png({})
    with pytest.raises(ParameterError, match="at least one"):
        accuracy_curve_png({"gram": []})


def test_more_curves_than_colours_are_refused() -> None:
    with pytest.raises(ParameterError, match="8 curves; 7"):
        accuracy_curve_png({f"m{i}": [1.0] for i in range(8)})


def test_labels_that_do_not_fit_a_matrix_are_refused_with_both_shapes() -> None:
    with pytest.raises(ParameterError, match=r"\(3, 3\).*\(2, 3\)"):
        matrix_png(SQUARE, row_labels=NAMES[:2], column_labels=NAMES)


def test_an_empty_colour_range_is_refused() -> None:
    with pytest.raises(ParameterError, match="empty"):
        matrix_png(SQUARE, row_labels=NAMES, column_labels=NAMES, low=1.0, high=1.0)


def test_a_row_that_does_not_fit_the_header_is_refused() -> None:
    with pytest.raises(ParameterError, match="row 1 has 1 cells"):
        table_html(["method", "ACC"], [["gram", "88.0"], ["opcm"]])


@pytest.mark.parametrize("values", [[1.0, 1.0, 1.0], [5.0, 4.9, 0.0, 4.95], [3.0], []])
def test_line_labels_stay_apart_in_their_order(values) -> None:
    heights = _apart(values, gap=0.5)
    assert sorted(range(len(values)), key=lambda i: (values[i], heights[i])) == sorted(
        range(len(values)), key=lambda i: heights[i]
    )
    ranked = sorted(heights)
    assert all(b - a >= 0.5 - 1e-12 for a, b in pairwise(ranked))


def test_line_labels_that_are_apart_stay_at_their_values() -> None:
    assert _apart([97.0, 10.0, 10.0], gap=4.0) == [97.0, 8.0, 12.0]


def test_missing_matplotlib_is_told_with_the_extra_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MerganserError, match=r'hint: pip install "merganser\[plots\]"'):
        accuracy_curve_png(CURVES)


def test_layers_need_lines_of_one_length() -> None:
    for values in ({}, {"a": []}, {"a": [1.0], "b": [1.0, 2.0]}):
        with pytest.raises(ParameterError, match="lines of one length"):
            layers_png(values)
    assert layers_png({"a": [0.1, 0.2], "b": [0.3, 0.1]}).startswith(b"\x89PNG")
