"""Write any text into Markdown so that it is shown as it is: names may contain Markdown, HTML or ends of lines."""

import re


class Markdown(str):
    """Text that is Markdown already and must not be escaped."""


def single_line(text: str) -> str:
    """Replace every run of white space and control characters by one space."""
    return re.sub(r"[\s\x00-\x1f\x7f-\x9f]+", " ", text)


def inline(text: str) -> Markdown:
    """Escape text for a heading, a paragraph, a list or a cell of a table."""
    text = re.sub(r"&(?=#?\w+;)", "&amp;", single_line(text))
    text = re.sub(r"[\\`*\[\]|]", r"\\\g<0>", text)
    return Markdown(text.replace("<", "&lt;").replace(">", "&gt;"))


def code(text: str) -> Markdown:
    """Return a code span."""
    text = single_line(text)
    mark = "`" * (_longest_run(text) + 1)
    space = " " if "`" in (text[:1], text[-1:]) else ""
    return Markdown(f"{mark}{space}{text}{space}{mark}")


def code_block(text: str, language: str) -> Markdown:
    """Return a fenced code block."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return Markdown(f"{fence}{language}\n{text}\n{fence}")


def _longest_run(text: str) -> int:
    """Return the length of the longest run of backticks."""
    return max(map(len, re.findall("`+", text)), default=0)


__all__ = ["Markdown", "code", "code_block", "inline", "single_line"]
