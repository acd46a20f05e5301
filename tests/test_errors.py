"""A missing extra is named together with where this library was installed from."""

import json
from importlib import metadata
from types import SimpleNamespace

import pytest

from retensor.errors import MissingExtraError


def installed(monkeypatch, record: str | None) -> str:
    """The message when pip left ``record`` as its note of where the library came from."""
    monkeypatch.setattr(metadata, "distribution", lambda name: SimpleNamespace(read_text=lambda file: record))
    return str(MissingExtraError("drawing", "picture"))


def test_a_folder_is_named(monkeypatch):
    record = json.dumps({"url": "file:///home/a%20b/retensor", "dir_info": {"editable": True}})
    assert (
        installed(monkeypatch, record) == 'drawing needs the picture extra: pip install "/home/a b/retensor[picture]"'
    )


@pytest.mark.parametrize("record", [None, "", "no JSON", "{}", "[]", '{"url": "https://example.org/retensor.whl"}'])
def test_anything_else_is_named_by_the_library(monkeypatch, record):
    assert installed(monkeypatch, record) == 'drawing needs the picture extra: pip install "retensor[picture]"'
