"""What the site does to its pages beyond Markdown: equations, links, marks.

Equations become MathML, which browsers draw without a script. A link to a file of the
repository, which is right where the page is read beside the code, leads to the same
file under `repo_url`, or becomes the file's name where the site has no such setting.
The marks of figures and of code blocks, which are comments, are left out: within a
sentence Markdown takes a comment for the end of the paragraph.
"""

import posixpath
import re
from html import unescape
from typing import Any

from latex2mathml.converter import convert

EQUATION = re.compile(
    r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL
)
OUTWARD = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+[^)]+)\)")


MARK = re.compile(r"<!-- (?:(?:table|cell|backend|not run): .*?|end) -->")


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Turn links that lead out of docs/ to the repository; leave marks out."""
    folder = posixpath.join("docs", posixpath.dirname(page.file.src_uri))

    def rewrite(match: re.Match[str]) -> str:
        text, target = match.groups()
        path = posixpath.normpath(posixpath.join(folder, target))
        if path.startswith("docs/"):
            return match[0]
        if config.repo_url:
            return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{path})"
        return f"`{path}`" if text == path else f"{text} (`{path}`)"

    return MARK.sub("", OUTWARD.sub(rewrite, markdown))


def on_page_content(html: str, **_: Any) -> str:
    """Turn equations to MathML."""

    def draw(match: re.Match[str]) -> str:
        tag, latex = match.groups()
        display = "block" if tag == "div" else "inline"
        return convert(unescape(latex).strip(), display=display)

    return EQUATION.sub(draw, html)
