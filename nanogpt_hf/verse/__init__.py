"""Verse: stress, metre and rhyme of Russian and English lines, and rewards made of them (extra `verse`).

Submodules are imported one by one: `from nanogpt_hf.verse.scansion import scan`.
"""
