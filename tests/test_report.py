"""The HTML page: self-contained, bounded, escaped, and true to the report."""

import re
from html.parser import HTMLParser

import pytest
from tiny_checkpoint import save_checkpoint, words

from causalattn import report
from causalattn.cli.analyze import score
from causalattn.cli.model import load
from causalattn.report import to_html

EMPTY = {"br", "hr", "img", "meta", "link", "input"}


class Page(HTMLParser):
    """Every address and every unclosed element of a page."""

    def __init__(self, text):
        super().__init__()
        self.addresses, self.open, self.cells, self.headings = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.addresses += [value for name, value in attributes if name in ("src", "href", "action", "data", "srcset")]
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["td"]:
            self.cells.append(data)
        if self.open[-1:] == ["th"]:
            self.headings.append(data)


def section_of(folder, text, drawn=False, title="text"):
    return score(load(str(folder)), title, text, drawn, None)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("bert"), positions=4096, layers=1)


@pytest.fixture(scope="module")
def long_page(bert):
    return to_html("bert", [section_of(bert, words(4096), drawn=True)])


def test_the_page_asks_for_nothing_from_outside(long_page):
    page = Page(long_page)
    assert page.open == [] and len(page.addresses) == 7
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert not re.search(r"https?://|url\(|@import|<link|fetch\(", long_page)


def test_only_a_long_text_shows_its_whole(bert, long_page):
    short = to_html("bert", [section_of(bert, words(128), drawn=True)])
    assert short.count("<figure>") == 5 and long_page.count("<figure>") == 7
    for phrase in ("in cells of", "20 largest of all weights A_ij"):
        assert phrase in long_page and phrase not in short
    assert "in cells of 32 × 32 weights" in long_page


def test_the_page_is_bounded_however_long_the_text(bert, long_page):
    assert len(long_page.encode()) < 3_000_000
    short, long = (to_html("bert", [section_of(bert, words(n))]) for n in (200, 1000))
    assert len(long) < len(short) + report.EXCERPT


def test_the_table_says_what_the_report_says(bert):
    section = section_of(bert, "Because the storm intensified , the ship finally sank .")
    page = Page(to_html("bert", [section]))
    rows = section.report.rows()
    names = [name for name, _, _ in report.columns_of(rows)]
    assert "unmasked" not in names and len(page.headings) == len(names) + 1
    found = [page.cells[n : n + len(names) + 1] for n in range(0, len(page.cells), len(names) + 1)]
    assert found == [[*(report.cell(row, name) for name in names), report.received_text(row)] for row in rows]


def test_a_causal_page_says_what_the_mask_fixes(tmp_path):
    page = to_html("gpt2", [section_of(save_checkpoint(tmp_path, "gpt2"), "the ship sank .")])
    assert "1 − mean A_ii" in page and ">unmasked</th>" in page and "mask: causal" in page


def test_text_and_tokens_are_escaped(bert):
    page = to_html("<model>", [section_of(bert, "<b> & <b> $x$", title="<title>")])
    assert "<b>" not in page and "<model>" not in page and "&lt;b&gt; &amp;" in page


def test_a_page_of_many_heads_shows_those_furthest_from_their_null(bert, monkeypatch):
    monkeypatch.setattr(report, "ROWS", 1)
    section = section_of(bert, words(12))
    page = Page(to_html("bert", [section]))
    best = sorted(section.report.rows(), key=report.strength, reverse=True)
    width = len(page.headings)
    assert len(page.cells) == width
    assert [page.cells[0], page.cells[1]] == [str(best[0]["layer"]), str(best[0]["head"])]
    assert "furthest from their null: 1<" in to_html("bert", [section])


def test_two_texts_are_two_sections(bert):
    section = section_of(bert, words(9))
    page = to_html("bert", [section, section._replace(title="again", tokens_left_out=7)])
    assert page.count("<section>") == 2 and "(7 more did not fit)" in page


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [("z", -3.14159, "-3.1"), ("sink_removed_z", None, "–"), ("dag_score", 0.12345, "0.123"), ("layer", 3, "3")],
)
def test_cells(name, value, text):
    assert report.cell({name: value}, name) == text
