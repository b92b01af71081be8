"""Messages of the errors that a user can correct."""

import pickle

import pytest

from co2s_hf.data.validation.checks import DataError
from co2s_hf.hub.publishing import PublishError
from co2s_hf.training.logbook import DivergenceError
from co2s_hf.utils import errors
from co2s_hf.utils.errors import UserOSError, loading


KINDS = [kind for name, kind in vars(errors).items() if name.startswith("User")]


@pytest.mark.parametrize("kind", [*KINDS, DataError, PublishError, DivergenceError], ids=lambda kind: kind.__name__)
def test_every_message_hides_the_secrets_of_addresses(kind):
    error = kind("https://me:pass@host/a.tif?sig=abc cannot be read.")
    expected = "https://HIDDEN@host/a.tif?HIDDEN cannot be read."
    assert str(error) == expected and error.args == (expected,)
    assert repr(error) == f"{kind.__name__}('{expected}')"
    assert str(pickle.loads(pickle.dumps(error))) == expected  # errors of other processes


def test_the_message_of_a_library_is_redacted_and_the_cause_kept():
    cause = OSError("403 for url 'https://host/a?token=abc'")
    with pytest.raises(UserOSError) as raised, loading("`checkpoint` is 'https://me:pass@host/a', which"):
        raise cause
    assert str(raised.value) == (
        "`checkpoint` is 'https://HIDDEN@host/a', which cannot be loaded. 403 for url 'https://host/a?HIDDEN'"
    )
    assert raised.value.__cause__ is cause


@pytest.mark.parametrize(
    "error", [KeyError("gelu2"), AttributeError("gelu2"), TypeError("gelu2"), IndexError("gelu2")]
)
def test_wrong_values_in_a_configuration_are_named_with_their_error(error):
    message = rf"damaged or of another program: {type(error).__name__}: .*gelu2"
    with pytest.raises(UserOSError, match=message), loading("`checkpoint` is 'model', which"):
        raise error
