"""What the pages of the analysis share: one HTML file that needs no other, readable by day and by night."""

import html

from ..common.text import printable

# Colours by day and by night, as the page's color-scheme says where they are used.
COLOURS = """
:root {
  --page: light-dark(#faf8f4, #171614); --card: light-dark(#ffffff, #201f1c); --ink: light-dark(#22201c, #ece7de);
  --dim: light-dark(#77716a, #9c958a); --edge: light-dark(#e2ddd4, #38352f);
}
"""
LAYOUT = """
:root { color-scheme: light dark; }
body { margin: 0; background: var(--page); color: var(--ink); font: 17px/1.5 Georgia, "PT Serif", "DejaVu Serif", serif; }
main { max-width: 78rem; margin: 0 auto; padding: 2rem 1.5rem 4rem; }
h1 { font-size: 1.6rem; margin: 0 0 0.5rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 0.25rem; }
p { margin: 0.25rem 0; color: var(--dim); font-size: 0.9rem; max-width: 60rem; }
"""


def whole_page(title: str, body: str, style: str = "", language: str = "en") -> str:
    """A page of its own.

    Args:
        title: any text; `body` and `style` are HTML and CSS.
    """
    return (
        f'<!doctype html>\n<html lang="{language}">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escaped(title)}</title>\n<style>{COLOURS}{LAYOUT}{style}</style>\n<main>\n<h1>{escaped(title)}</h1>\n"
        f"{body}\n</main>\n</html>\n"
    )


def escaped(text: str) -> str:
    """Any text as HTML that shows it, in an element or an attribute."""
    return html.escape(printable(text))
