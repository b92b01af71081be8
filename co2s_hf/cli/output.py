"""Rewrite what a command shows: the messages of libraries, with flags instead of parameters and without secrets."""

import logging
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO

from ..utils.redaction import redact


class RewrittenStream:
    """A text stream that rewrites every text before it is written.

    A character that the encoding of the stream does not have, such as "ü" in ASCII, is written as \\xfc. Otherwise a
    class name could stop a command on Windows, where a redirected output has few characters.

    Args:
        stream: Where the text goes. All other attributes are those of this stream.
        rewrite: Function that changes the text.
    """

    def __init__(self, stream: TextIO, rewrite: Callable[[str], str]):
        self._stream, self._rewrite = stream, rewrite

    def write(self, text: str) -> int:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self._stream.write(self._rewrite(text).encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def writelines(self, lines):
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def rewritten_output(rewrite: Callable[[str], str]) -> Iterator[None]:
    """Rewrite the standard streams and all log messages of the block.

    Log messages are rewritten where they are made, because a library may have kept the streams when it was imported.

    Args:
        rewrite: Function that changes the text.
    """
    make_record = logging.getLogRecordFactory()

    def make_rewritten(*args, **kwargs) -> logging.LogRecord:
        record = make_record(*args, **kwargs)
        with suppress(TypeError, ValueError, KeyError):  # the arguments do not fit the message; logging reports it
            text = record.getMessage()
            if (rewritten := rewrite(text)) != text:
                record.msg, record.args = rewritten, None
        return record

    logging.setLogRecordFactory(make_rewritten)
    stdout, stderr = RewrittenStream(sys.stdout, rewrite), RewrittenStream(sys.stderr, rewrite)
    try:
        with redirect_stdout(stdout), redirect_stderr(stderr):
            yield
    finally:
        logging.setLogRecordFactory(make_record)


def show_traceback(kind: type[BaseException], error: BaseException, trace):
    """Print the traceback of an error that no command handles, without secrets. For `sys.excepthook`."""
    text = "".join(traceback.format_exception(kind, error, trace))
    print(redact(text), end="", file=sys.stderr)


__all__ = ["rewritten_output", "show_traceback"]
