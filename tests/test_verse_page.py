"""The table and the page of verse."""

import html
import re

import pytest

from nanogpt_hf.analysis.verse_page import verse_page
from nanogpt_hf.analysis.verse_table import VERSE_COLUMNS, measure_verse
from nanogpt_hf.common.tables import table
from nanogpt_hf.verse.metre import Metre
from nanogpt_hf.verse.rhyme import Scheme
from nanogpt_hf.verse.scansion import Form
from nanogpt_hf.verse.stanzas import whole_stanzas

pytest.importorskip("silero_stress")

FORM = Form(metre=Metre("iamb", 4), scheme=Scheme("AbAb"))
STANZA = """Мой дядя самых честных правил,
Когда не в шутку занемог,
Он уважать себя заставил
И лучше выдумать не мог."""
PROSE = "Погода была ужасная.\nПоезд отправляется в полночь."
HOSTILE = "<b>Мой</b> & «дядя»\x1b[31m\n\n<script>alert(1)</script>"


def test_a_row_counts_lines_and_pairs_of_all_texts_together():
    row = measure_verse("both", [STANZA, PROSE], FORM, ["Он уважать себя заставил"])
    assert row == {
        "model": "both",
        "poems": 2,
        "metre": 4 / 6,
        "rhyme": 2 / 4,  # prose begins two pairs
        "rhyme_sounds": 1,
        "whole": 1 / 2,
        "lines": 3,
        "characters": (len(STANZA) + len(PROSE)) / 2,
        "longest_overlap": len("Он уважать себя заставил"),
        "distinct_n": 1,
    }
    real = measure_verse("real", whole_stanzas([f"I\n\n{STANZA}\n\n{PROSE}\n"], FORM), FORM)
    assert real["poems"] == 1 and real["metre"] == real["rhyme"] == 1 and "longest_overlap" not in real
    lines = table([row, real], VERSE_COLUMNS).splitlines()
    assert [cell.strip() for cell in lines[0].split("|")][1:5] == ["", "poems", "in metre", "rhymed"]
    assert [cell.strip() for cell in lines[3].split("|")][1:7] == [
        "real",
        "1",
        "100.0%",
        "100.0%",
        "100%",
        "",
    ]


def test_texts_without_verse_have_a_row():
    row = measure_verse("none", ["", "..."], FORM, [STANZA])
    assert table([row], VERSE_COLUMNS).splitlines()[2].count("nan") == 2


@pytest.fixture(scope="module")
def page():
    groups = {"real": [STANZA], "</h2>": [HOSTILE, PROSE]}
    return verse_page("<i>title", groups, FORM, {"real": "100% <of>"})


def articles(page):
    return re.findall("<article>\n(.*?)\n</article>", page, re.S)


def text_of(article):
    """What a reader sees, without the letters of the rhymes."""
    return html.unescape(re.sub("<[^>]+>", "", re.sub('<span class="letter.*?</span>', "", article)))


def test_the_page_is_one_file_that_shows_the_texts_as_they_are(page):
    assert list(map(text_of, articles(page))) == [STANZA, HOSTILE.replace("\x1b", "\\x1b"), PROSE]
    assert (
        "&lt;/h2&gt;</h2>" in page and "100% &lt;of&gt;" in page and "<title>&lt;i&gt;title</title>" in page
    )
    assert "http" not in page and "src=" not in page and "@import" not in page
    assert "<script" not in page and "\x1b" not in page and "<b>" not in page and "<i>" not in page
    assert "light-dark(" in page


def test_stresses_feet_and_rhymes_are_marked(page):
    real, _, prose = articles(page)
    first = real.strip().splitlines()[0]
    assert re.findall('class="[^"]*stress[^"]*">(.)<', first) == ["я", "а", "е", "а"]
    assert re.findall('class="hue[^"]*">(.*?)<', first) == ["а", "вил"]
    assert "".join(re.findall('class="[^"]*odd[^"]*">(.*?)<', first)) == "дя саных пра"
    assert re.findall('<span class="letter hue">(.)<', real) == list("AbAb")
    assert "wrong" not in real and " off" not in real
    assert re.findall('<span class="letter">(.)<', prose) == list("Ab")
    assert prose.count('class="line off"') == 2 and "wrong" in prose


def test_rhymes_all_on_one_sound_are_seen():
    """A stanza of them fits any scheme."""
    form, alike = Form(scheme=Scheme("aabb")), "ночь\nдочь\nпрочь\nточь"
    assert measure_verse("alike", [alike], form)["rhyme"] == 1
    assert measure_verse("alike", [alike], form)["rhyme_sounds"] == 1 / 2
    assert measure_verse("unlike", ["ночь\nдочь\nдом\nлом"], form)["rhyme_sounds"] == 1
