"""The quickstart's text: what is left of an article's markup, and that a file is there whole or not at all."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import zstandard

SCRIPT = Path(__file__).parents[2] / "examples" / "fetch_text.py"


@pytest.fixture(scope="module")
def fetch_text():
    spec = importlib.util.spec_from_file_location("fetch_text", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ARTICLE = """{{Infobox settlement | name = Ulm | map = [[File:Map.png|thumb]]}}
[[File:Minster.jpg|thumb|The [[Ulm Minster|minster]] seen from the south, a caption that is long enough]]
'''Ulm''' is a [[city]] on the river [[Danube|Danube]], in ''Germany''.<ref>{{cite|Atlas}}</ref> It has (&nbsp;) walls.

== History ==
* an item of a list, which stays since it is longer than forty characters
* a short item
{| class="wikitable"
| a cell of a table that is certainly longer than forty characters in all
|}
The city was first named in a document of the year 854, as a royal palace.<!-- checked --> __NOTOC__
[[Category:Cities in Germany whose names are short enough to be remembered]]
"""


def test_prose_is_left_of_an_article(fetch_text):
    parser = pytest.importorskip("mwparserfromhell")
    assert fetch_text.plain(parser.parse(ARTICLE)) == (
        "Ulm is a city on the river Danube, in Germany. It has walls.\n\n"
        "an item of a list, which stays since it is longer than forty characters\n\n"
        "The city was first named in a document of the year 854, as a royal palace.")


def test_code_is_whole_and_in_a_fixed_order(fetch_text):
    texts = fetch_text.python_code()
    first = [next(texts) for _ in range(5)]
    assert first == [text for text, _ in zip(fetch_text.python_code(), range(5))]
    for text in first:
        compile(text, "module", "exec")


def test_a_file_is_there_whole_or_not_at_all(fetch_text, tmp_path, capsys):
    path = tmp_path / "a.jsonl.zst"

    def breaks(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_text.make(path, "what", breaks)
    assert not list(tmp_path.iterdir())
    fetch_text.make(path, "what", lambda file: fetch_text.write(file, "RedPajamaBook", iter(["é", "two"])))
    fetch_text.make(path, "what", breaks)
    records = zstandard.ZstdDecompressor().stream_reader(path.read_bytes()).read().splitlines()
    meta = {"redpajama_set_name": "RedPajamaBook"}
    assert [json.loads(record) for record in records] == [{"text": "é", "meta": meta}, {"text": "two", "meta": meta}]
    assert "2 documents" in capsys.readouterr().out and [file.name for file in tmp_path.iterdir()] == ["a.jsonl.zst"]
