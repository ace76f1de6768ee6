"""Stress, metre and rhyme against lines scanned by hand and a whole novel in verse; rewards."""

import functools
import itertools
import os
import random
import re
from pathlib import Path
from statistics import mean

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nanogpt_hf import metrics
from nanogpt_hf.common.errors import UserError
from nanogpt_hf.verse import rewards, russian
from nanogpt_hf.verse.drills import Drills
from nanogpt_hf.verse.metre import FEET, Metre, align
from nanogpt_hf.verse.readings import Ending, Reading
from nanogpt_hf.verse.rhyme import Scheme, rhymes
from nanogpt_hf.verse.russian_sounds import rhyming_sounds
from nanogpt_hf.verse.scansion import FORMS, Form, scan

TEXT = Path(os.environ.get("NANOGPT_HF_DATA") or os.devnull, "tiny_pushkin.txt")
ONEGIN_ENDS = 140_000  # characters; the lyric poems follow

# Scanned by hand: a capital vowel is a stress, in words of more than one syllable; words of one fit either place. Then
# the line's metre, or None. The two rows with ! are what silero-stress reads otherwise: вИденье, вЫхожу.
BY_HAND = """
мой дЯдя сАмых чЕстных прАвил, | iamb 4
когдА не в шУтку занемОг, | iamb 4
он уважАть себЯ застАвил | iamb 4
и лУчше вЫдумать не мог. | iamb 4
егО примЕр другИм наУка; | iamb 4
с больнЫм сидЕть и день и ночь, | iamb 4
не отходЯ ни шАгу прочь! | iamb 4
какОе нИзкое ковАрство | iamb 4
полуживОго забавлЯть, | iamb 4
емУ подУшки поправлЯть, | iamb 4
печАльно подносИть лекАрство, | iamb 4
вздыхАть и дУмать про себЯ: | iamb 4
или блистАли, мой читАтель; | iamb 4
я пОмню чУдное мгновЕнье: | iamb 4
передо мной явИлась ты, | iamb 4
как мимолЁтное видЕнье, | iamb 4 !
как гЕний чИстой красотЫ. | iamb 4
морОз и сОлнце; день чудЕсный! | iamb 4
ещЁ ты дрЕмлешь, друг прелЕстный — | iamb 4
люблЮ тебЯ, петрА творЕнье, | iamb 4
адмиралтЕйская иглА. | iamb 4
ещЁ однО, послЕднее сказАнье — | iamb 5
я пАмятник себЕ воздвИг нерукотвОрный, | iamb 6
подрУга дУмы прАздной, | iamb 3
бУря мглОю нЕбо крОет, | trochee 4
вИхри снЕжные крутЯ; | trochee 4
то, как зверь, онА завОет, | trochee 4
то заплАчет, как дитЯ, | trochee 4
вЕтер, вЕтер! ты могУч, | trochee 4
ты гонЯешь стАи туч, | trochee 4
три девИцы под окнОм | trochee 4
мчАтся тУчи, вьЮтся тУчи; | trochee 4
выхожУ одИн я на дорОгу; | trochee 5 !
о, веснА без концА и без крАю — | anapaest 3
есть в напЕвах твоИх сокровЕнных | anapaest 3
вот парАдный подъЕзд. по торжЕственным дням | anapaest 4
не гулЯл с кистенЁм я в дремУчем лесУ, | anapaest 4
тУчки небЕсные, вЕчные стрАнники! | dactyl 4
стЕпью лазУрною, цЕпью жемчУжною | dactyl 4
вЫрыта зАступом Яма глубОкая. | dactyl 4
слАвная Осень! здорОвый, ядрЁный | dactyl 4
гОсти съезжАлись на дАчу. | dactyl 3
как нЫне сбирАется вЕщий олЕг | amphibrach 4
отмстИть неразУмным хозАрам: | amphibrach 3
не вЕтер бушУет над бОром, | amphibrach 3
не с гор побежАли ручьИ, | amphibrach 3
по сИним волнАм океАна, | amphibrach 3
однАжды, в студЁную зИмнюю пОру, | amphibrach 4
чЕстных мой дЯдя сАмых прАвил, | None
когдА не в шУтку он занемОг, | None
всЁ смешАлось в дОме облОнских. | None
погОда былА ужАсная. | None
пОезд отправлЯется в пОлночь. | None
открОйте, пожАлуйста, окнО. | None
мАма мЫла рАму в пЯтницу вЕчером. | None
сей лист от 24 сентябрЯ | None
shall i compAre thee to a sUmmer's day? | iamb 5
thou art more lOvely and more tEmperate: | iamb 5
rough winds do shake the dArling buds of may, | iamb 5
when, in disgrAce with fOrtune and men's eyes, | iamb 5
i all alOne bewEep my Outcast state, | iamb 5
my mIstress' eyes are nOthing like the sun; | iamb 5
to be, or not to be, that is the quEstion: | iamb 5
whEther 'tis nObler in the mind to sUffer | iamb 5
but, soft! what light through yOnder wIndow breaks? | iamb 5
twInkle, twInkle, lIttle star | trochee 4
once upOn a mIdnight drEary, while i pOndered, weak and wEary, | trochee 8
the cAptain was Only fEeling his age | None
nObody knew that wAter was rIsing | None
"""
ROWS = [
    pytest.param(
        *(part.strip(" !") for part in row.split("|")),
        marks=[pytest.mark.xfail(strict=True)] if row.endswith("!") else [],
        id=row.split("|")[0].strip(),
    )
    for row in BY_HAND.strip().splitlines()
]
METRES = sorted({row.values[1] for row in ROWS} - {"None"})


@functools.cache
def form(language, metre="iamb 4", scheme="abab"):
    """The form of a row: dactyls end as they please; in English inversion, and an unstressed last place."""
    foot, feet = metre.split()
    english = language == "en"
    endings = (0, 1, 2) if foot == "dactyl" else (0, 1)
    return Form(language, Metre(foot, int(feet), endings, english, not english), Scheme(scheme))


def language_of(line):
    language = "ru" if re.search("[а-я]", line) else "en"
    pytest.importorskip({"ru": "silero_stress", "en": "pronouncing"}[language])
    return language


def line_in(text, *of_form):
    return scan([text.lower()], form(language_of(text), *of_form))[0].lines[0]


def test_stress_leaves_torch_as_it_is():
    pytest.importorskip("silero_stress")
    russian._accentor.cache_clear()
    torch.set_num_threads(2)
    state = torch.get_rng_state()
    try:
        russian._accentor()
        assert torch.is_grad_enabled() and torch.get_num_threads() == 2
        assert torch.equal(torch.get_rng_state(), state)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("text, metre", ROWS)
def test_lines_scanned_by_hand(text, metre):
    own = metre if metre != "None" else "iamb 4"
    line = line_in(text, own)
    for syllable in line.syllables:
        by_hand = re.search("[A-ZА-ЯЁ]", text[syllable.start : syllable.end]) is not None
        assert syllable.stressed in (by_hand, None), text[syllable.start : syllable.end]
    for other in {own, "iamb 4", "iamb 5"} if metre != "None" else METRES:
        if other == metre or "iamb" not in metre:
            assert line_in(text, other).in_metre == (other == metre), other


def ending(text):
    """The ending "слОво" or "где вы" from its capital on, or from the first vowel where a word has only one."""
    vowels = re.findall("[аеёиоуыэюя]", text.split()[0], re.I)
    stressed = next((number for number, vowel in enumerate(vowels) if vowel.isupper()), 0)
    words = tuple(text.lower().split())
    return Ending(words, rhyming_sounds(words, stressed), 0)


RHYMES = """
прАвил:застАвил занемОг:мог наУка:скУка ночь:прочь ковАрство:лекАрство забавлЯть:поправлЯть почтовЫх:роднЫх
невЫ:вы приЯтель:читАтель благорОдно:ежегОдно одЕт:свет сад:брат глаз:час снег:век нож:грош рожь:нож мышь:камЫш
кровь:любОвь лоб:поп был:мил стыд:говорИт слОва:такОго мнОго:дорОга садИтся:девИца подъЕзд:мест
прелЕстный:небЕсный пОздно:грОзно чУвства:искУсства жемАнства:педАнтства сердЕц:конЕц рОбко:тОпка лОдка:глОтка
улЫбкой:зЫбкий вОлны:пОлный гЕний:тЕни прекрАсный:напрАсно я:менЯ друзьЯ:моЯ совершЕнно:непринуждЁнно
дЕвы:где_вы нЕжной:мятЕжный далекО:легкО еЁ:моЁ лицА:отцА объЯтья:плАтья нос:перевелОсь рУсский:Узкий счАстье:учАстье
"""
NO_RHYMES = """
дом:стол тебЯ:менЯ любвИ:дни водЫ:мечтЫ жар:царь брат:брать кон:конь прАвил:прАвила мать:мял окнО:письмО пОле:мОря
ночь:нож гОды:гОда другА:врагИ лист:лис пасть:пас тень:тем сон:сын зАмок:замОк домА:дОма бЕлый:смЕлость мой:письмО
идУ:найдУт сад:сада рукА:рукА рУсский:вкУсный кровь:пот я:рукА моЯ:плечА ждЁт:жест
"""


@pytest.mark.parametrize("table, expected", [(RHYMES, True), (NO_RHYMES, False)], ids=["rhymes", "none"])
def test_rhymes_by_hand(table, expected):
    for pair in table.split():
        one, other = (ending(text.replace("_", " ")) for text in pair.split(":"))
        assert rhymes(one, other) == rhymes(other, one) == expected, (pair, one.sounds, other.sounds)


CONSONANTS = "бвгджзклмнпрстфхцчшщ"
STEMS = st.text("абвгдежзиклмнопрстуфхцчшщыэюя", min_size=1, max_size=8).filter(
    lambda stem: stem[-1] in "аоуыэ"
)
PAIRED = st.sampled_from(["бп", "вф", "гк", "дт", "жш", "зс"])


def last_vowel(word):
    return len(re.findall("[аеёиоуыэюя]", word)) - 1


class TestSounds:
    @given(STEMS, PAIRED)
    def test_a_last_voiced_consonant_is_voiceless(self, stem, pair):
        voiced, voiceless = (rhyming_sounds([stem + letter], last_vowel(stem)) for letter in pair)
        assert voiced == voiceless

    @given(STEMS, PAIRED, st.sampled_from("птбгд"))
    def test_a_consonant_has_the_voice_of_the_next_one(self, stem, pair, after):
        one, other = (rhyming_sounds([stem + letter + after + "а"], last_vowel(stem)) for letter in pair)
        assert one == other

    @given(STEMS, st.sampled_from(CONSONANTS), st.sampled_from(["ао", "ыэ", "еи"]))
    def test_vowels_after_the_stress_are_reduced(self, stem, consonant, vowels):
        one, other = (rhyming_sounds([stem + consonant + vowel], last_vowel(stem)) for vowel in vowels)
        assert not one.isdisjoint(other)

    @given(STEMS, STEMS, st.sampled_from(CONSONANTS))
    def test_what_is_before_the_stressed_vowel_does_not_matter_in_a_closed_ending(
        self, one, other, consonant
    ):
        sounds = [rhyming_sounds([stem + "рок" + consonant], last_vowel(stem) + 1) for stem in (one, other)]
        assert sounds[0] == sounds[1]

    @given(STEMS, st.sampled_from(CONSONANTS), st.sampled_from(CONSONANTS))
    def test_an_open_ending_needs_its_consonant(self, stem, one, other):
        sounds = [rhyming_sounds([stem + letter + "у"], last_vowel(stem) + 1) for letter in (one, other)]
        assert (sounds[0] == sounds[1]) == (one == other)

    @given(st.text("абвгдеёжзийклмнопрстуфхцчшщъыьэюя", min_size=1, max_size=12), st.integers(0, 11))
    @example("ъъ", 0)
    def test_any_letters_have_sounds(self, word, stressed):
        vowels = last_vowel(word) + 1
        if vowels:
            assert all(rhyming_sounds([word], stressed % vowels))


class TestRhyme:
    def test_the_same_word_is_no_rhyme(self):
        one = Ending(("рука",), frozenset(["ка"]), 0)
        assert not rhymes(one, one)
        assert rhymes(one, one._replace(words=("река",)))

    def test_the_stanza_of_onegin(self):
        pairs = [(letter, first, second) for letter, first, second in Scheme().pairs(14)]
        assert pairs == [
            *[("A", 0, 2), ("b", 1, 3), ("C", 4, 5), ("d", 6, 7)],
            *[("E", 8, 11), ("f", 9, 10), ("g", 12, 13)],
        ]

    def test_a_longer_stanza_begins_anew_and_a_shorter_one_lacks_its_partners(self):
        assert list(Scheme("abab").pairs(6)) == [
            *[("a", 0, 2), ("b", 1, 3)],
            *[("a", 4, None), ("b", 5, None)],
        ]
        assert list(Scheme("aab ccb").pairs(6)) == [("a", 0, 1), ("b", 2, 5), ("c", 3, 4)]
        assert list(Scheme("aaa").pairs(3)) == [("a", 0, 1), ("a", 1, 2)]

    @given(st.text("abAB", min_size=1, max_size=9), st.integers(0, 30))
    def test_pairs_are_two_lines_of_one_letter_in_one_round(self, letters, lines):
        if len(set(letters)) == len(letters):
            return
        for letter, first, second in Scheme(letters).pairs(lines):
            assert letters[first % len(letters)] == letter
            if second is not None:
                assert first < second < lines and letters[second % len(letters)] == letter
                assert first // len(letters) == second // len(letters)

    @pytest.mark.parametrize("scheme, met", [("aa", True), ("AA", True), ("AA bb", True), ("aa BB", False)])
    def test_a_scheme_of_both_cases_wants_feminine_and_masculine_endings(self, scheme, met):
        one, other = (Ending((word,), frozenset(["орога"]), 1) for word in ("дорога", "строга"))
        assert Scheme(scheme).met(scheme[0], one, other) == met
        assert not Scheme(scheme).met(scheme[0], one, None)

    @pytest.mark.parametrize("letters", ["", "abc", "Aa", "a1a1", "a-a"])
    def test_a_scheme_in_which_nothing_rhymes_is_refused(self, letters):
        with pytest.raises(UserError, match="rhyme scheme"):
            Scheme(letters)


class TestMetre:
    def test_patterns(self):
        assert Metre("iamb", 2).patterns == ["wswS", "wswSw"]
        assert Metre("dactyl", 2, (0, 2)).patterns == ["swwS", "swwSww"]
        assert Metre("iamb", 2, (0,), inversion=True, stressed_end=False).patterns == ["wsws", "swws"]
        assert Metre("amphibrach", 1, (1,), inversion=True).patterns == ["wSw"]

    @pytest.mark.parametrize("wrong", [{"foot": "jamb"}, {"feet": 0}, {"endings": ()}, {"endings": (-1,)}])
    def test_a_metre_that_is_none_is_refused(self, wrong):
        with pytest.raises(UserError):
            Metre(**wrong)

    @given(
        st.lists(st.lists(st.text("+-?", max_size=3), min_size=1, max_size=3), max_size=5),
        st.sampled_from([pattern for foot in FEET for pattern in Metre(foot, 2).patterns]),
    )
    @settings(max_examples=300, deadline=None)
    def test_words_are_aligned_as_the_best_of_all_choices(self, marks, pattern):
        def misfits_of(said):
            against = {"w": "+", "s": "", "S": "-"}
            return sum(mark in against[place] for mark, place in zip("".join(said), pattern, strict=True))

        all_choices = [choice for choice in itertools.product(*marks) if len("".join(choice)) == len(pattern)]
        said = align([[Reading(mark, "") for mark in word] for word in marks], pattern)
        if not all_choices:
            assert said is None
        else:
            chosen = tuple(reading.marks for reading in said)
            assert chosen in all_choices
            assert misfits_of(chosen) == min(map(misfits_of, all_choices))


def shuffled(line, rng):
    words = re.findall("[а-яё]+", line.lower())
    rng.shuffle(words)
    return " ".join(words)


@pytest.fixture(scope="module")
def stanzas():
    """Every third whole stanza of Eugene Onegin."""
    pytest.importorskip("silero_stress")
    if not TEXT.exists():
        pytest.skip("NANOGPT_HF_DATA is not set")
    blocks = TEXT.read_text(encoding="utf-8")[:ONEGIN_ENDS].split("\n\n")
    return [block for block in blocks if block.count("\n") == 13][::3]


class TestOnegin:
    def test_lines_are_in_metre_and_pairs_rhyme(self, stanzas):
        poems = scan(stanzas, FORMS["onegin"])
        assert len(poems) > 90
        assert sum(poem.metre_share for poem in poems) / len(poems) >= 0.9
        assert sum(poem.rhyme_share for poem in poems) / len(poems) >= 0.85

    def test_shuffled_words_are_not_in_metre(self, stanzas):
        rng = random.Random(0)
        texts = ["\n".join(shuffled(line, rng) for line in stanza.split("\n")) for stanza in stanzas]
        poems = scan(texts, FORMS["onegin"])
        assert sum(poem.metre_share for poem in poems) / len(poems) <= 0.3

    def test_random_lines_do_not_rhyme(self, stanzas):
        rng = random.Random(0)
        endings = [
            line.ending for poem in scan(stanzas, FORMS["onegin"]) for line in poem.lines if line.ending
        ]
        pairs = [rng.sample(endings, 2) for _ in range(20_000)]
        assert sum(rhymes(*pair) for pair in pairs) / len(pairs) <= 0.03

    def test_another_metre_or_scheme_is_not_his(self, stanzas):
        for other in (Form(metre=Metre("trochee", 4)), Form(metre=Metre("iamb", 5))):
            assert sum(poem.metre_share for poem in scan(stanzas, other)) / len(stanzas) < 0.05
        couplets = scan(stanzas, Form(scheme=Scheme("aa")))
        assert sum(poem.rhyme_share for poem in couplets) / len(stanzas) < 0.5


class TestScan:
    def test_spans_places_and_partners(self):
        pytest.importorskip("silero_stress")
        text = "I\n\nМой дядя самых честных правил,\nКогда не в шутку занемог,\nОн уважать себя заставил\n\nИ лучше выдумать не мог."
        poem = scan([text], Form(scheme=Scheme("AbAb")))[0]
        assert poem.numbers == (2, 3, 4, 6)
        first = poem.lines[0]
        parts = [first.text[syllable.start : syllable.end] for syllable in first.syllables]
        assert parts == ["Мой", "дя", "дя", "са", "мых", "чест", "ных", "пра", "вил"]
        assert [syllable.stressed for syllable in first.syllables] == [None, *[True, False] * 4]
        assert [syllable.strong for syllable in first.syllables] == [False, *[True, False] * 4]
        assert all(line.in_metre for line in poem.lines)
        assert [(pair.letter, pair.first, pair.second, pair.rhymed) for pair in poem.pairs] == [
            *[("A", 0, 2, True), ("b", 1, None, False)],  # the stanza ends before its last line
            ("A", 3, None, False),
        ]

    def test_a_mark_of_stress_in_the_text_is_believed(self):
        pytest.importorskip("silero_stress")
        for word, mark in [("за́мок", [True, False]), ("замо́к", [False, True])]:
            line = scan([word], Form())[0].lines[0]
            assert [syllable.stressed for syllable in line.syllables] == mark

    def test_what_is_no_verse(self):
        pytest.importorskip("silero_stress")
        assert scan(["", "\n\n", "XIV", "* * *", "1833"], Form()) == [((), (), ())] * 5
        assert scan([""], Form())[0].metre_share == scan([""], Form())[0].rhyme_share == 0
        foreign = scan(["Как dandy лондонский одет\nгм"], Form())[0].lines
        assert [line.in_metre for line in foreign] == [False, False]

    @given(st.text(st.sampled_from("аеёийоубвтньъ\u0301ЯЁ -—,.\n\r\tIx1é’'\u2028😀"), max_size=60))
    @example("а" * 3000 + "\n" + "к" * 3000)
    @settings(max_examples=100, deadline=None)
    def test_any_text_is_scanned_and_spans_are_in_order(self, text):
        for language in ("ru", "en"):
            pytest.importorskip({"ru": "silero_stress", "en": "pronouncing"}[language])
            poem = scan([text], Form(language))[0]
            lines = text.split("\n")
            for number, line in zip(poem.numbers, poem.lines, strict=True):
                assert lines[number] == line.text
                places = [place for syllable in line.syllables for place in (syllable.start, syllable.end)]
                assert places == sorted(places) and all(0 <= place <= len(line.text) for place in places)

    def test_another_language_is_refused(self):
        with pytest.raises(UserError, match="'fr'.* ru, en"):
            Form("fr")

    def test_a_sonnet_of_shakespeare(self):
        pytest.importorskip("pronouncing")
        couplet = (
            "So long as men can sing, or eyes can see,\nSo long lives this, and this gives life to thee."
        )
        poem = scan([couplet], Form("en", FORMS["sonnet"].metre, Scheme("GG")))[0]
        assert poem.metre_share == poem.rhyme_share == 1
        assert scan([couplet.replace("thee", "you")], Form("en", scheme=Scheme("aa")))[0].rhyme_share == 0
        assert scan(["way see\nday see"], Form("en", scheme=Scheme("aa")))[0].rhyme_share == 0


class TestDrills:
    def test_answers_rhyme_and_lines_stay_in_metre(self, stanzas):
        form = FORMS["onegin"]
        drawn = Drills(stanzas, form).draw(200, seed=1)
        poems = scan([drill.text for drill in drawn], form)
        rhymed = []
        for drill, poem in zip(drawn, poems, strict=True):
            answered = {pair.second for pair in poem.pairs if pair.rhymed}
            rhymed += [line in answered for line in drill.answers]
        assert len(rhymed) > 6 * len(drawn)  # of seven
        assert mean(rhymed) > 0.995  # the metre of a line may want a homograph's other reading
        before = mean(poem.metre_share for poem in scan(stanzas, form))
        assert abs(mean(poem.metre_share for poem in poems) - before) < 0.02

    def test_words_at_the_ends_are_exchanged_and_a_seed_is_a_draw(self, stanzas):
        drills = Drills(stanzas[:1], FORMS["onegin"])
        drawn = drills.draw(20, seed=2)
        assert drawn == drills.draw(20, seed=2) != drills.draw(20, seed=3)
        assert len({drill.text for drill in drawn}) > 15
        own = [line.split(" ")[:-1] for line in stanzas[0].split("\n")]
        assert all([line.split(" ")[:-1] for line in drill.text.split("\n")] == own for drill in drawn)

    def test_the_first_lines_of_a_form_alone(self, stanzas):
        drawn = Drills(stanzas, Form(scheme=Scheme("AbAb"))).draw(30, seed=3)
        assert all(drill.text.count("\n") == 3 and set(drill.answers) <= {2, 3} for drill in drawn)

    def test_of_three_lines_on_one_rhyme_two_are_drilled(self):
        pytest.importorskip("silero_stress")
        form = Form(scheme=Scheme("ababab"))
        stanza = "Прошла любовь\nНастала ночь\nВскипела кровь\nУходит прочь\nВернётся вновь\nРодная дочь"
        for drill in Drills([stanza, stanza], form).draw(20, seed=1):
            (poem,) = scan([drill.text], form)
            answered = {pair.second for pair in poem.pairs if pair.rhymed}
            assert drill.answers and answered.issuperset(drill.answers)
            assert set(re.findall("[а-яё]+", drill.text)) <= set(re.findall("[а-яё]+", stanza))

    def test_what_cannot_be_exchanged_is_refused(self):
        pytest.importorskip("silero_stress")
        with pytest.raises(UserError, match="no rhyme in the 1 stanzas can be exchanged .* --drill_steps 0"):
            Drills(["Мороз и солнце\nДень чудесный"], Form(scheme=Scheme("aa")))


STANZA = "Мой дядя самых честных правил,\nКогда не в шутку занемог,\nОн уважать себя заставил\nИ лучше выдумать не мог."
PROSE = "Погода была ужасная.\nПоезд отправляется в полночь."


class TestRewards:
    def test_verse_is_worth_more_than_prose(self):
        pytest.importorskip("silero_stress")
        form = Form(scheme=Scheme("AbAb"))
        for name in rewards.OF_FORM:
            reward = rewards.Rewards(form, {name: 1}, guards=())
            values = [lines.mean() for lines in reward.combined(reward.by_name([STANZA, PROSE, ""]))]
            best = 0.5 if name == "rhyme" else 1  # two of four lines answer
            assert values[0] == best and 0 <= values[1] < best and values[2] == 0
        twice, prose, mixed = rewards.line_count(form)(["\n".join([STANZA] * 2), PROSE, f"{STANZA}\n\n…"])
        assert [*twice] == [0] * 8 and [*prose] == [0.5] * 2 and [*mixed] == [1] * 6
        scanned = rewards.scan_lines([f"{STANZA}\n{PROSE}"], form)[0]
        assert [*scanned.metre] == [1, 1, 1, 1, 0, 0] and [*scanned.feet[:4]] == [1] * 4

    def test_a_line_ends_as_its_rhyme_wants(self):
        pytest.importorskip("silero_stress")
        for scheme, endings in (
            ("AbAb", [1, 1, 1, 1]),
            ("aBaB", [0, 0, 0, 0]),
            ("AAAb", [1, 0, 1, 1]),
            ("abab", [1] * 4),
        ):
            (scanned,) = rewards.scan_lines([STANZA], Form(scheme=Scheme(scheme)))
            assert [*scanned.endings] == endings  # b of AAAb rhymes with nothing, and may end anyhow

    def test_a_line_is_worth_what_it_has_of_the_metre(self):
        """Without its first syllable a line of iambs is out of place; with one too many it nearly fits."""
        pytest.importorskip("silero_stress")
        lines = (
            "Мой дядя самых честных правил\nДядя самых честных правил\nМой дядя самых честных злых правил\n\n"
        )
        (scanned,) = rewards.scan_lines([lines], Form())
        whole, shifted, longer, *empty = scanned.feet
        assert whole == 1 and 0 <= shifted < longer < 1 and not any(empty)

    def test_a_stanza_all_on_one_rhyme_has_the_worth_of_one_pair(self):
        pytest.importorskip("silero_stress")
        alike = "ночь моя\nдочь моя\nпрочь моя\nточь моя".replace(" моя", "")
        scanned = rewards.scan_lines([alike], Form(scheme=Scheme("aabb")))[0]
        assert [*scanned.rhyme] == [0, 0.5, 0, 0.5]

    def test_repetition_is_worth_less(self):
        texts = ["a b c d", "a e a e", "f f f f f", "a", ""]
        one, two, three, *short = (lines for (lines,) in rewards.variety(texts))
        assert (one, two, three, short) == (1, (1 / 2 + 1 + 1 / 2) / 3, 1 / 4, [1, 1])
        counted = metrics.load("distinct_n").compute(predictions=["a e a e"], n=2)["distinct_n"]
        assert two == counted
        assert rewards.variety(["buried"])[0] == 1 and rewards.variety(["buried buried"])[0] == 1 / 2

    def test_a_line_of_short_words_is_worth_nothing(self):
        """It would be in any metre."""
        (lines,) = rewards.stresses(Form())(["Он мил, но лир и пир\nМой дядя\nМой дядя самых честных\n"])
        assert [*lines] == [0, 0.5, 1, 0]
        (lines,) = rewards.stresses(FORMS["sonnet"])(
            ["So long as men can sing\nOr gracious\nMy lovely mistress"]
        )
        assert [*lines] == [0, 0.5, 1]

    def test_words_that_no_text_has_are_worth_nothing(self):
        (lines,) = rewards.spelling(["Мой дядя, самых честных правил"])(["мой ДЯДЯ!\nдядя дядел\nы\n"])
        assert [*lines] == [1, 0.5, 0, 0]

    @given(
        st.lists(st.text("аб\n😀\ud800", max_size=12), max_size=3),
        st.lists(st.text("аб\n😀\ud800", min_size=1, max_size=30), min_size=1, max_size=3),
        st.integers(1, 5),
    )
    @settings(max_examples=30, deadline=None)
    def test_copying_is_what_the_metric_calls_it(self, texts, training_texts, window):
        by_hand = []
        for text in texts:
            ends = [text[max(0, end - window) : end] for end in range(len(text) + 1)]
            copied = [len(end) == window and any(end in known for known in training_texts) for end in ends]
            lines = iter(copied)
            by_hand.append([1 - mean(next(lines) for _ in f"{line}\n") for line in text.split("\n")])
        if max(map(len, training_texts)) < window:
            with pytest.raises(UserError, match="no training text"):
                rewards.originality(training_texts, window)
        else:
            found = [[*lines] for lines in rewards.originality(training_texts, window)(texts)]
            assert found == [pytest.approx(lines) for lines in by_hand]

    def test_a_function_of_ones_own(self, tmp_path, monkeypatch):
        (tmp_path / "my_rewards_of_this_test.py").write_text(
            "def short(text):\n    return 1 / (1 + len(text))\n"
        )
        monkeypatch.chdir(tmp_path)
        assert rewards.load_reward("my_rewards_of_this_test:short")(["", "a\n"]) == [
            [1],
            pytest.approx([1 / 3, 1 / 3]),
        ]

    @pytest.mark.parametrize(
        "name, message",
        [
            ("no_such_module_anywhere:f", "no module 'no_such_module_anywhere'"),
            ("os.no_such_module:f", "no module 'os.no_such_module'"),
            ("os:getcw", "no function 'getcw'. Did you mean 'getcwd'"),
            ("os:sep", "no function 'sep'"),
            ("os", "module:function"),
            (":f", "module:function"),
        ],
    )
    def test_a_function_that_is_not_there(self, name, message):
        with pytest.raises(UserError, match=re.escape(message)):
            rewards.load_reward(name)

    def test_a_broken_module_keeps_its_traceback(self, tmp_path, monkeypatch):
        (tmp_path / "broken_of_this_test.py").write_text("import no_such_module_anywhere\n")
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ModuleNotFoundError, match="no_such_module_anywhere"):
            rewards.load_reward("broken_of_this_test:f")

    @pytest.mark.parametrize("value", [None, float("nan"), float("inf"), "1"])
    def test_what_is_no_number_is_refused(self, value):
        with pytest.raises(UserError, match="finite number"):
            rewards.of_each_text(lambda text: value)(["a"])

    def test_several_are_weighed_and_a_guard_lets_nothing_make_up_for_it(self, tmp_path, monkeypatch):
        (tmp_path / "ones_of_this_test.py").write_text("one = lambda text: 1\nlength = len\n")
        monkeypatch.chdir(tmp_path)
        weights = {"ones_of_this_test:one": 1, "ones_of_this_test:length": 3}
        both = rewards.Rewards(Form(), weights, guards=())
        assert (
            both.combined(both.by_name(["", "ab"])) == [[0.25], [1.75]]
            and both.combined(both.by_name([])) == []
        )
        known = ["Мой дядя самых честных правил\nКогда не в шутку"]
        guarded = rewards.Rewards(Form(), {"ones_of_this_test:one": 1}, rewards.GUARDS, known)
        given = guarded.by_name([*known, "дядя дядя", "правил дядя мой"])
        (_, copied), (repeated,), (good,) = guarded.combined(given)
        assert (
            copied == 0 and repeated == 0.5 and good == 1 and {*given} == {*guarded.weights, *rewards.GUARDS}
        )

    @pytest.mark.parametrize(
        "weights, guards, message",
        [
            ({}, (), "above 0"),
            ({"metre": 0}, (), "above 0"),
            ({"metre": float("nan")}, (), "above 0"),
            ({"meter": 1}, (), "none of metre"),
            ({"metre": 1}, ("spell",), "none of originality"),
        ],
    )
    def test_rewards_that_cannot_be_are_refused(self, weights, guards, message):
        with pytest.raises(UserError, match=message):
            rewards.Rewards(Form(), weights, guards)
