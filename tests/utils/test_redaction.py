"""Secrets of addresses, and tokens of the Hub, are hidden in texts and values."""

import json

import pytest

from co2s_hf.utils.redaction import redact, redacted


TOKEN = "hf_" + "aB3" * 11
# Every text has "SECRET" where a secret is.
TEXTS = {
    # queries and fragments
    "https://host/a.tif?X-Amz-Signature=SECRET&x=SECRET": "https://host/a.tif?HIDDEN",
    "s3://bucket/a.tif?token=SECRET gs://b/c?SECRET": "s3://bucket/a.tif?HIDDEN gs://b/c?HIDDEN",
    "https://host/a#access_token=SECRET": "https://host/a#HIDDEN",
    "https://host/x,y?bbox=(1,2),(3,4)&token=SECRET": "https://host/x,y?HIDDEN",
    "https://host/it's(1)/a.tif?sig=SECRET'SECRET": "https://host/it's(1)/a.tif?HIDDEN",
    # user info
    "ftp://user:SECRET@host/a@2x.tif": "ftp://HIDDEN@host/a@2x.tif",
    "https://SECRET@host": "https://HIDDEN@host",
    "https://user:SEC@RET@host/a": "https://HIDDEN@host/a",
    "https://user:SEC/RET?SECRET@host/a": "https://HIDDEN@host/a",
    "https://proxy/https://user:SECRET@host/a?SECRET": "https://proxy/https://HIDDEN@host/a?HIDDEN",
    "cannot find /home/me/https:/user:SECRET@host/a?SECRET": "cannot find /home/me/https:/HIDDEN@host/a?HIDDEN",
    # paths of GDAL, and percent-encoded addresses
    "/vsicurl/https://host/a.tif?sig=SECRET": "/vsicurl/https://host/a.tif?HIDDEN",
    "/vsizip//vsicurl/https://host/a.zip?sig=SECRET/b.tif": "/vsizip//vsicurl/https://host/a.zip?HIDDEN",
    "/vsicurl?url=https%3A%2F%2Fhost%2Fa.tif%3Fsig%3DSECRET": "/vsicurl?url=https%3A%2F%2Fhost%2Fa.tif%3FHIDDEN",
    "/vsicurl?header.Authorization=SECRET&url=https%3a%2f%2fhost": "/vsicurl?url=https%3a%2f%2fhost&HIDDEN",
    "/vsicurl?header.Authorization=SECRET": "/vsicurl?HIDDEN",
    "http%3A%2F%2Fuser%3ASECRET%40host%2Fa": "http%3A%2F%2FHIDDEN@host%2Fa",
    "http%253A%252F%252Fhost%252Fa%253FSECRET": "http%253A%252F%252Fhost%252Fa%253FHIDDEN",
    # the end of an address alone
    "with url: /a.tif?x=1&X-Goog-Signature=SECRET (reset)": "with url: /a.tif?x=1&X-Goog-Signature=HIDDEN (reset)",
    "/a.tif?se=2030&sig=SECRET&sp=r": "/a.tif?se=2030&sig=HIDDEN&sp=r",
    # punctuation after an address stays
    "'https://host/a?SECRET', (https://host/b?SECRET). End": "'https://host/a?HIDDEN', (https://host/b?HIDDEN). End",
    "['https://host/a?SECRET', 'b?']": "['https://host/a?HIDDEN', 'b?']",
    # several lines
    "no\n  https://u:SECRET@host/a?SECRET\nyes": "no\n  https://HIDDEN@host/a?HIDDEN\nyes",
}


@pytest.mark.parametrize("text", TEXTS)
def test_secrets_are_hidden_and_the_rest_of_a_text_stays(text):
    assert redact(text) == TEXTS[text]
    assert redact(redact(text)) == TEXTS[text]


@pytest.mark.parametrize(
    "text",
    [
        "https://host:8080/a@b.tif and https://[::1]:80/a@b, s3://bucket/key",
        "Is it https://host/a? `bands=(4, 3, 2)`; C:\\a?b C:/a@b user@host.org hf_transfer hf_hub_download",
        "/vsizip/a.zip/b.tif /vsis3/bucket/key NETCDF:a.nc:red 50 % of #1",
    ],
)
def test_other_text_does_not_change(text):
    assert redact(text) == text


def test_tokens_of_the_hub_are_hidden():
    text = f"Bearer {TOKEN}, hf_oauth_eyJ0eXA.SECRET-x_y and api_org_{TOKEN[3:]}."
    assert redact(text) == "Bearer hf_HIDDEN, hf_HIDDEN and hf_HIDDEN."


def test_a_renewed_signature_gives_the_same_text():
    before, after = ("https://host/a.tif?X-Amz-Date=1&X-Amz-Signature=b", "https://host/a.tif?X-Amz-Signature=c")
    assert redact(before) == redact(after) != redact("https://host/b.tif?X-Amz-Signature=c")


def test_values_are_redacted_before_they_become_json():
    value = {"command": ["--a", 'say "https://h/a?k=1"', ("https://u:p@h",)], "seed": 1, "none": None, "?a=1": True}
    expected = {"command": ["--a", 'say "https://h/a?HIDDEN"', ["https://HIDDEN@h"]], "seed": 1, "none": None}
    assert json.loads(json.dumps(redacted(value))) == expected | {"?a=1": True}
    assert value["command"][2] == ("https://u:p@h",)  # unchanged


@pytest.mark.parametrize("part", ["ab://", "ab://c:d", "ab:///@", "%3A%2F", "?a=", "/vsia?", "&sig", "%25"])
def test_long_words_take_time_in_proportion_to_their_length(part):
    """With quadratic time, each of these would take minutes."""
    text = redact("@" + part * 50_000)
    assert text.startswith("@") and redact(text) == text
