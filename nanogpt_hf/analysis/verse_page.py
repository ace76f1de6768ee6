"""A page that shows poems with their stresses, feet and rhymes: one HTML file that needs no other."""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence

from ..verse.metre import FEET
from ..verse.scansion import LANGUAGES, Form, Line, Poem, Syllable, scan
from .html_page import escaped, whole_page

HUES = 8  # of rhymes, as many as STYLE has

STYLE = """
:root {
  --foot: light-dark(#f1ece2, #2d2a26); --wrong: light-dark(#c4161c, #ff7b72);
  --r0: light-dark(#1d5fbf, #7db5ff); --r1: light-dark(#b35300, #ffab66); --r2: light-dark(#177a3a, #6ed192);
  --r3: light-dark(#7a37b8, #cda2ff); --r4: light-dark(#0b7480, #5fd0dc); --r5: light-dark(#b0237d, #ff8fcf);
  --r6: light-dark(#806000, #e3bf55); --r7: light-dark(#4c6b00, #b5d167);
}
.poems { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 23rem), 1fr)); gap: 1rem; margin-top: 1rem; }
article { background: var(--card); border: 1px solid var(--edge); border-radius: 6px; padding: 1rem 1rem 0.75rem; }
.line { display: flex; align-items: baseline; gap: 0.5rem; line-height: 2; min-height: 1.2rem; }
.line > .text { flex: 1; white-space: pre-wrap; overflow-wrap: anywhere; border-left: 3px solid transparent; padding-left: 0.6rem; }
.off > .text { border-left-color: var(--wrong); }
.none > .text { color: var(--dim); }
.odd { background: var(--foot); }
.stress, .may { position: relative; }
.stress { font-weight: 700; }
.stress::before, .may::before { position: absolute; left: 50%; top: -0.3em; line-height: 1; transform: translateX(-50%);
  font-weight: 400; content: "\\00b4"; }
.may::before { content: "\\00b7"; top: -0.36em; color: var(--dim); }
.wrong { text-decoration: underline wavy var(--wrong) 1.5px; text-underline-offset: 0.25em; text-decoration-skip-ink: none; }
.hue { color: var(--hue); }
.letter { display: inline-block; flex: none; width: 1.6em; text-align: center; border: 1.5px dashed var(--dim); border-radius: 1em;
  color: var(--dim); font: 0.75rem/1.5 system-ui, sans-serif; }
.letter.hue { border: 1.5px solid var(--hue); color: var(--hue); font-weight: 700; }
""" + "".join(f".h{hue} {{ --hue: var(--r{hue}); }}\n" for hue in range(HUES))

LEGEND = (
    '<p><span class="stress">а</span> stressed · <span class="may">а</span> a word of one syllable in a strong place · '
    '<span class="wrong">а</span> against the metre · <span class="odd">&nbsp;every&nbsp;</span> second foot is shaded · '
    '<span class="h0"><span class="letter hue">A</span></span> rhymed, from the last stress on · '
    '<span class="letter">A</span> not rhymed · a red edge: the line is not in metre</p>'
)


def verse_page(
    title: str, groups: Mapping[str, Sequence[str]], form: Form, notes: Mapping[str, str] | None = None
) -> str:
    """A page in HTML that shows texts as verse: each line with its stresses, its feet and its rhyme.

    Args:
        groups: heading, as the name of a model -> texts.
        notes: heading -> what to say below it.
    """
    sections = []
    for heading, texts in groups.items():
        shown = zip(texts, scan(texts, form), strict=True)
        poems = "\n".join(f"<article>\n{article_of(text, poem, form)}\n</article>" for text, poem in shown)
        note = escaped((notes or {}).get(heading, ""))
        sections.append(f'<h2>{escaped(heading)}</h2>\n<p>{note}</p>\n<div class="poems">\n{poems}\n</div>')
    return whole_page(title, "\n".join([LEGEND, *sections]), STYLE, form.language)


def article_of(text: str, poem: Poem, form: Form) -> str:
    """The lines of a text in HTML, those that are no verse too.

    Args:
        poem: what `scan` makes of it.
    """
    letters: dict[int, tuple[str, int | None]] = {}  # line of the poem -> its letter, and the hue of a rhyme
    for number, pair in enumerate(poem.pairs):
        for place in (pair.first, pair.second):
            if place is not None and (pair.rhymed or place not in letters):
                letters[place] = pair.letter, number % HUES if pair.rhymed else None
    places = {number: place for place, number in enumerate(poem.numbers)}
    rows = []
    for number, words in enumerate(text.rstrip("\n").split("\n")):
        if number not in places:
            rows.append(f'<div class="line none"><span class="text">{escaped(words)}</span></div>')
            continue
        line = poem.lines[places[number]]
        letter, hue = letters.get(places[number], ("", None))
        look = ("" if line.in_metre else " off") + ("" if hue is None else f" h{hue}")
        marked = "".join(_marked(line, form, hue is not None))
        mark = (
            f'<span class="letter{"" if hue is None else " hue"}">{escaped(letter)}</span>' if letter else ""
        )
        rows.append(f'<div class="line{look}"><span class="text">{marked}</span>{mark}</div>')
    return "\n".join(rows)


def _marked(line: Line, form: Form, rhymed: bool) -> Iterator[str]:
    """The line's letters, those that look alike in one element."""
    looks: list[set[str]] = [set() for _ in line.text]
    length = len(FEET[form.metre.foot])
    for number, syllable in enumerate(line.syllables):
        last_of_foot = (number + 1) % length == 0 or number + 1 == len(line.syllables)
        end = syllable.end if last_of_foot else line.syllables[number + 1].start
        if number // length % 2:
            for place in range(syllable.start, end):
                looks[place].add("odd")
        if not syllable.fits:
            for place in range(syllable.start, syllable.end):
                looks[place].add("wrong")
        if syllable.stressed or (syllable.stressed is None and syllable.strong):
            looks[_vowel(line, syllable, form)].add("stress" if syllable.stressed else "may")
    if rhymed and line.ending:
        begin = _vowel(line, line.syllables[-1 - line.ending.tail], form)
        for place in range(begin, line.syllables[-1].end):
            looks[place].add("hue")
    for look, run in itertools.groupby(zip(looks, line.text, strict=True), lambda pair: pair[0]):
        letters = escaped("".join(letter for _, letter in run))
        yield f'<span class="{" ".join(sorted(look))}">{letters}</span>' if look else letters


def _vowel(line: Line, syllable: Syllable, form: Form) -> int:
    """Where in the line the syllable has its vowel, or begins if none is spelt."""
    vowel = re.search(LANGUAGES[form.language].VOWELS, line.text[syllable.start : syllable.end], re.I)
    return syllable.start + (vowel.start() if vowel else 0)
