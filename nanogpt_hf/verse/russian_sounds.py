"""Russian letters to the sounds that rhyme: reduction, devoicing, assimilation, silent letters.

After Avanesov, Russian Literary Pronunciation (1950), and for what verse takes for a rhyme Zhirmunsky, Rhyme, Its
History and Theory (1923). It is no full transcription: sounds that no rhyme tells apart are one. A sound is a
letter, with ' if soft; the vowels are а о у э и.
"""

import re
from collections.abc import Sequence

VOWELS = dict(zip("аяоёуюэеыи", "ааооууээии", strict=True))
SOFTENING = "еёюяиь"
NEVER_MARKED = "жшцчщй"  # always hard, or always soft
SOFT = ("'", "ч", "щ", "й")
SOFT_PAIRED = [letter + "'" for letter in "бвгдзклмнпрстфх"]
VOICED, VOICELESS = "бвгджз", "пфктшс"
DEVOICED = dict(zip(VOICED, VOICELESS, strict=True))
REVOICED = dict(zip(VOICELESS, VOICED, strict=True))

# What is said otherwise than it is written, in this order.
SPELLINGS = [
    (r"ть?ся$", "ца"),
    (r"(?<=[гкх])ий$", "ой"),
    (r"([сз])[тд](?=[нл])", r"\1"),
    (r"рдц", "рц"),
    (r"лнц", "нц"),
    (r"вств", "ств"),
    (r"[тд](?=ств)", ""),
    (r"[сзж]ч", "щ"),
    (r"[тд]ч", "ч"),
    (r"[сз](?=[шж])", ""),
    (r"[тд](?=ц)", ""),
    (r"[тд]с", "ц"),
    (r"г(?=[кч])", "х"),
]
# What may be said otherwise: -ого is -ово but in "много"; -сь was hard on Moscow's stage.
WAYS = [(r"(?<=[ое])го$", "во"), (r"сь$", "с")]


def sounds(word: str) -> list[str]:
    """The sounds of a word in lower case with its ё, its vowels as if all were stressed."""
    for written, said in SPELLINGS:
        word = re.sub(written, said, word)
    heard: list[str] = []
    before = ""
    for letter in word:
        after_consonant = heard and heard[-1] not in VOWELS.values() and before not in "ьъ"
        if letter in SOFTENING and after_consonant:
            if heard[-1] not in NEVER_MARKED:
                heard[-1] += "'"
        elif letter in "еёюя" or (letter == "и" and before):
            heard.append("й")
        if letter in VOWELS:
            heard.append(VOWELS[letter])
        elif letter not in "ьъ":
            heard.append(letter)
        before = letter
    return _single(_voiced_alike(heard))


def _voiced_alike(heard: list[str]) -> list[str]:
    """Consonants take the voice of the one after them; the last of a word has none. в and sonorants give none."""
    heard, after = list(heard), VOICELESS[0]
    for place in range(len(heard) - 1, -1, -1):
        letter = heard[place][0]
        if after in VOICELESS + "хцчщ":
            letter = DEVOICED.get(letter, letter)
        elif after in "бгджз":
            letter = REVOICED.get(letter, letter)
        heard[place], after = letter + heard[place][1:], letter
    return heard


def _single(heard: list[str]) -> list[str]:
    """Of a double consonant the second."""
    pairs = zip(heard, [*heard[1:], ""], strict=False)
    return [sound for sound, after in pairs if sound[0] != after[:1] or sound in VOWELS.values()]


def _reduced(heard: list[str]) -> list[str]:
    """A word, or its end, without stress: о is а, э is и, and so is а after a soft consonant or before a last й."""
    quiet = list(heard)
    for place, sound in enumerate(heard):
        after = heard[place + 1 :]
        soft = place > 0 and heard[place - 1].endswith(SOFT)
        if sound == "э" or (sound in ("а", "о") and ((soft and after) or after == ["й"])):
            quiet[place] = "и"
        elif sound == "о":
            quiet[place] = "а"
    return quiet


def rhyming_sounds(words: Sequence[str], stressed: int) -> frozenset[str]:
    """The ways to hear the end of a line from its last stressed vowel; two lines rhyme if they share one.

    A rhyme on a last open vowel needs the consonant before it too; й goes with any soft one there (я, меня).
    An unstressed end may lose its й (волны, полный; напрасно, прекрасный). ё may be е, as it was.

    words: the last words of a line, in lower case with ё. stressed: which vowel of the first of them, from 0.
    """
    heard = set()
    for last in {words[-1]} | {re.sub(written, said, words[-1]) for written, said in WAYS}:
        first, *others = (sounds(word) for word in (*words[:-1], last))
        place = [place for place, sound in enumerate(first) if sound in VOWELS.values()][stressed]
        tail = "".join(map("".join, map(_reduced, (first[place + 1 :], *others))))
        before = first[place - 1] if place and not tail else ""
        befores = [*SOFT_PAIRED, "й"] if before == "й" else [before]
        vowels = {first[place], "э"} if "ё" in words[0] and first[place] == "о" else {first[place]}
        tails = {tail, tail[:-1], tail[:-2] + "а"} if tail.endswith("ий") else {tail}
        heard |= {before + vowel + tail for before in befores for vowel in vowels for tail in tails}
    return frozenset(heard)
