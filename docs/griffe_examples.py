"""Shows the examples of docstrings as code: `>>>` lines become a fenced block."""

import re
from typing import Any

import griffe

DOCTEST = re.compile(r"^ *>>> .*\n(?: *(?:>>>|\.\.\.) .*(?:\n|$))*", re.MULTILINE)
PROMPT = re.compile(r"^ *(?:>>>|\.\.\.) ", re.MULTILINE)


class FenceExamples(griffe.Extension):
    """Fences every example before the docstring is parsed."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of what was just found."""
        if obj.docstring:
            obj.docstring.value = DOCTEST.sub(fenced, obj.docstring.value + "\n")


def fenced(match: re.Match[str]) -> str:
    """Turn one example into a block of Python."""
    return f"```python\n{PROMPT.sub('', match[0]).rstrip()}\n```\n"
