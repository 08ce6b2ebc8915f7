from __future__ import annotations

import pytest

from mapo_lightning.config.redact import is_secret_name, redact, redact_text


@pytest.mark.parametrize("name", ["key", "api_key", "apiKey", "hf-token", "PASSWORD", "db_secret"])
def test_names_of_secrets(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize("name", ["max_tokens", "monkey", "keyboard", "uri", "tokenizer"])
def test_names_of_other_things(name: str) -> None:
    assert not is_secret_name(name)


@pytest.mark.parametrize(
    "text",
    [
        "postgresql://me:canary@db/x",
        "https://canary@host",
        "https://me:x@canary@host/path",
        "https://host/a?x=1&api_key=canary",
        "export A=AKIACANARYCANARY1234".replace("CANARY", "CANARY"),
    ],
)
def test_secrets_in_texts_are_hidden(text: str) -> None:
    assert "canary" not in redact_text(text).lower()


def test_trees_keep_their_shape() -> None:
    tree = {"a": [{"token": "x", "n": 1}], "api_key": "${oc.env:KEY}", "secret": "", "b": ("p",)}
    assert redact(tree) == {
        "a": [{"token": "***", "n": 1}],
        "api_key": "${oc.env:KEY}",
        "secret": "",
        "b": ["p"],
    }
