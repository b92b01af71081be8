"""Hide passwords, signatures and access tokens in text that is shown or stored.

A signed address gives everybody access to a file: the query has the signature, the user info has a password.
"""

import re
from collections.abc import Callable
from typing import Any


HIDDEN = "HIDDEN"
CLOSING = ")]}>\"'`.,;:!?|"  # at the end of a word, these do not belong to an address
TOKEN = re.compile(r"\b(?:hf|api_org)_(?:(?:oauth|jwt)_[\w.-]+|[A-Za-z0-9]{20,})")
# Options in GDAL's form /vsicurl?header.Authorization=...&url=https%3A%2F%2F...
GDAL_OPTIONS = re.compile(r"(?<=/)(vsi\w+\?)(.+)")
# An address without scheme and host, such as /scene.tif?X-Amz-Signature=...
SECRET_VALUE = re.compile(
    r"([?&](?:[\w.-]*(?:signature|token|credential|password|secret|key)|sig)=)[^&]+", re.IGNORECASE
)


class _AddressForm:
    """How addresses are written: plain or percent-encoded.

    Args:
        colon, slash, question, at: Patterns of ":", "/", "?" or "#", and "@".
    """

    def __init__(self, colon: str, slash: str, question: str, at: str):
        # After a scheme of two or more letters. A path that was made of an address has one slash.
        start = f"(?<=[a-z0-9+.-]{{2}}){colon}(?:{slash}){{1,2}}"
        host = f"(?:(?!{slash}|{question}).)*"
        # "user:" is followed by a password with "/", "?" or "#" if no port follows the colon.
        user = f"(?:(?!{colon}|{slash}|{question}|{at}|\\[).)*{colon}(?!\\d*(?:{slash}|{question}|$)).*"
        patterns = (start, f"({start})(?:{host}|{user}){at}", question, f".*{at}")
        self.start, self.user_info, self.question, self.to_last_at = (
            re.compile(pattern, re.IGNORECASE) for pattern in patterns
        )

    def redact(self, word: str) -> str:
        """Replace user info, query and fragment. The time is proportional to the length of the word."""
        if head := self.to_last_at.match(word):
            word = self.user_info.sub(rf"\1{HIDDEN}@", head[0]) + word[head.end() :]
        if start := self.start.search(word):
            question = self.question.search(word, start.end())
            if question and question.end() < len(word):
                word = word[: question.end()] + HIDDEN
        return word


FORMS = (
    _AddressForm(":", "/", "[?#]", "@"),
    _AddressForm("%(?:25)*3A", "%(?:25)*2F", "(?:%(?:25)*(?:3F|23)|[?#])", "(?:%(?:25)*40|@)"),
)


def redact(text: str) -> str:
    """Replace the secrets in a text by "HIDDEN": user info, query and fragment of addresses, and tokens of the Hub.

    `https://user:password@host/a.tif?signature=1` becomes `https://HIDDEN@host/a.tif?HIDDEN`. Addresses that differ
    only in their secrets therefore become equal. Percent-encoded addresses and those in paths of GDAL, such as
    `/vsicurl/https://...`, are found, too. A redacted text does not change when it is redacted again.
    """
    return TOKEN.sub(f"hf_{HIDDEN}", re.sub(r"\S+", lambda word: _redact_word(word[0]), text))


def redacted(value: Any, replace: Callable[[str], str] = redact) -> Any:
    """Return a copy of a value of JSON types with the secrets in all its strings replaced, but not in keys.

    Text that already is JSON must not be redacted: an address in it could hide the quotation marks after it.

    Args:
        value: The value.
        replace: Function that replaces the secrets in a string.
    """
    if isinstance(value, str):
        return replace(value)
    if isinstance(value, dict):
        return {key: redacted(entry, replace) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(entry, replace) for entry in value]
    return value


def _redact_word(word: str) -> str:
    core = word.rstrip(CLOSING)
    ending = word[len(core) :]
    core = GDAL_OPTIONS.sub(_url_option_alone, core)
    for form in FORMS:
        core = form.redact(core)
    return SECRET_VALUE.sub(rf"\1{HIDDEN}", core) + ending


def _url_option_alone(match: re.Match) -> str:
    """Hide all options except the address."""
    address = next((option for option in match[2].split("&") if option.startswith("url=")), None)
    kept = [option for option in (address, None if address == match[2] else HIDDEN) if option]
    return match[1] + "&".join(kept)


__all__ = ["redact", "redacted"]
