"""What a command prints and logs names flags, and hides secrets."""

import logging
import sys
from dataclasses import dataclass
from io import StringIO

import pytest
from tqdm.auto import tqdm

from co2s_hf.cli.command_line import Command, own_group, setting
from co2s_hf.cli.output import show_traceback
from co2s_hf.utils.errors import UserValueError


@dataclass
class Words:
    """Options."""

    resume: bool = setting(False, "Resume.")
    address: str = setting("", "Address.")


COMMAND = Command(name="try", description="Try.", groups=[own_group("words", Words)])
SIGNED, HIDDEN = "https://me:pass@host/a.tif?sig=abc", "https://HIDDEN@host/a.tif?HIDDEN"


def test_printed_text_is_rewritten(capsys):
    with COMMAND.user_errors():
        print(f"Reading {SIGNED}: `resume=True`, `other=1`.")
        print("warning:", SIGNED, file=sys.stderr)
        tqdm.write(SIGNED)
        assert sys.stdout.encoding and not sys.stdout.isatty()  # the attributes are those of the stream
    print("`resume=True`")
    shown = capsys.readouterr()
    assert shown.out == f"Reading {HIDDEN}: --resume, `other=1`.\n{HIDDEN}\n`resume=True`\n"
    assert shown.err == f"warning: {HIDDEN}\n"


def test_log_messages_are_rewritten_for_handlers_that_were_made_before():
    stream = StringIO()
    handler, logger = logging.StreamHandler(stream), logging.getLogger("co2s_hf.test_output")
    logger.addHandler(handler)
    try:
        with COMMAND.user_errors():
            logger.warning("%s is kept. Continue with `resume=True`.", SIGNED)
            logger.warning("%d files", 3)
        logger.warning("`resume=True`")
    finally:
        logger.removeHandler(handler)
    assert stream.getvalue() == f"{HIDDEN} is kept. Continue with --resume.\n3 files\n`resume=True`\n"


def test_errors_hide_secrets():
    with pytest.raises(SystemExit) as end, COMMAND.user_errors():
        raise UserValueError(f"{SIGNED} is wrong; give `resume=True`.")
    assert end.value.code == f"error: {HIDDEN} is wrong; give --resume."


@pytest.mark.parametrize("words", [["--resume", SIGNED], ["--adress", SIGNED], ["--config", SIGNED]])
def test_errors_of_the_parser_hide_secrets(words, capsys):
    with pytest.raises(SystemExit):
        COMMAND.parse(words)
    shown = capsys.readouterr().err
    assert HIDDEN in shown and "pass" not in shown and "abc" not in shown


def test_tracebacks_of_bugs_hide_secrets(capsys, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(KeyError) as bug, COMMAND.user_errors():
        raise KeyError(SIGNED)
    assert sys.excepthook is show_traceback
    sys.excepthook(KeyError, bug.value, bug.tb)
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback") and shown.endswith(f"KeyError: '{HIDDEN}'\n") and SIGNED not in shown
