"""Text in Markdown is shown as it is."""

import pytest
from markdown_it import MarkdownIt

from co2s_hf.utils.markdown import Markdown, code, code_block, inline, single_line


TEXTS = ["bare_soil", "a|b", "`a` ``b", "<b>&lt;&", "[a](b) *c*", "\\", "a\n\n---\r\n# b\x00\u2028c"]


def parsed(text: str) -> list:
    return MarkdownIt("commonmark").enable("table").parse(text)


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_shown_as_it_is(text):
    shown = " ".join(single_line(text).split())
    _, paragraph, _ = parsed(f"Name: {inline(text)}.")
    assert {child.type for child in paragraph.children} == {"text"}
    assert " ".join(paragraph.children[0].content.split()) == f"Name: {shown}."
    table = parsed(f"| a | b |\n|---|---|\n| {inline(text)} | c |")
    assert [token.children[0].content.strip() for token in table if token.type == "inline"] == ["a", "b", shown, "c"]
    _, paragraph, _ = parsed(f"Name {code(text)}.")
    assert [child.type for child in paragraph.children] == ["text", "code_inline", "text"]
    assert paragraph.children[1].content == single_line(text)


@pytest.mark.parametrize("text", ["a", "```\n# b\n````\nc", "~~~\n</details>"])
def test_code_blocks_contain_any_text(text):
    (block,) = parsed(code_block(text, "yaml"))
    assert (block.type, block.info, block.content) == ("fence", "yaml", f"{text}\n")


def test_plain_names_do_not_change():
    assert inline("bare_soil (2024), 50 % & more") == "bare_soil (2024), 50 % & more"
    assert code("user/name") == "`user/name`" and code_block("a: 1", "yaml") == "```yaml\na: 1\n```"
    assert isinstance(inline("a"), Markdown) and single_line("a \n\t b") == "a b"
