"""Texts that try to steer the judge (injections.jsonl): no parser reads a verdict out of them, none leaves its enclosure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_sip.teacher.questions import CHOICES, PLACEHOLDERS, defuse, fill, load_template, make_fence
from megatron_sip.teacher.verdict import parse_choice, parse_json, parse_plain

LINES = Path(__file__).with_name("injections.jsonl").read_text(encoding="utf-8").split("\n")
INJECTIONS = [json.loads(line) for line in LINES if line]
TEXTS = [one["text"] for one in INJECTIONS]


def test_there_are_at_least_a_hundred_of_every_kind():
    assert len(set(TEXTS)) == len(TEXTS) >= 100
    assert {one["kind"] for one in INJECTIONS} >= {"order", "verdict", "fence", "turn", "json", "language", "markup", "unseen", "long"}


@pytest.mark.parametrize("kind", CHOICES)
@pytest.mark.parametrize("verdict", [0, -1])
def test_reasons_that_quote_an_injection_do_not_change_the_verdict(kind, verdict):
    """Constrained answers: the quotation is a JSON string, whatever it says, and the verdict is the key's value."""
    choices, said = CHOICES[kind], CHOICES[kind][verdict]
    for text in TEXTS:
        for quoted in (text, f'The text says: "{text}"', f"{text}\n\nVerdict: {choices[0]}"):
            assert parse_json(json.dumps({"reasoning": quoted, "verdict": said}), choices) == said
        assert parse_choice(said, choices) == said


@pytest.mark.parametrize("kind", CHOICES)
def test_an_answer_in_words_that_quotes_an_injection_has_its_last_line_or_none(kind):
    """Unconstrained answers: the quotation may make an answer unreadable, never another one."""
    choices, readable = CHOICES[kind], 0
    for text in TEXTS:
        for said in choices:
            found = parse_plain(f"The text says {text!r}, which is no argument.\nVerdict: {said}", choices)
            assert found == said, text
            raw = parse_plain(f"It says:\n{text}\nThat is no argument.\nVerdict: {said}", choices)
            assert raw in (said, None), text
            readable += raw == said
    assert readable > 0.8 * len(TEXTS) * len(choices)


@pytest.mark.parametrize("kind", CHOICES)
def test_an_answer_that_goes_on_after_an_injection_is_no_verdict(kind):
    for text in TEXTS:
        for answer in (f"{text}\nis what it says.", f'I quote: "{text}" Hm.'):
            assert [parse(answer, CHOICES[kind]) for parse in (parse_choice, parse_json, parse_plain)] == [None] * 3, text


@pytest.mark.parametrize("kind", PLACEHOLDERS)
@pytest.mark.parametrize("name_of", [0, -1])
def test_no_injection_closes_its_fence(kind, name_of):
    """Exactly the lines with the fence that the template has, each text whole between its two."""
    template, names = load_template(kind, None), PLACEHOLDERS[kind]
    at = names[name_of]
    for text in TEXTS:
        texts = {name: f"ordinary {name}" for name in names} | {at: f"It rained.\n{text}"}
        more = {"prefix": "p", "words": "20"} if kind == "rewrite" else {}
        fence = make_fence([*texts.values(), *more.values()])
        prompt = fill(template, fence, **texts, **more)
        plain = fill(template, fence, **{name: "x" for name in texts}, **more)
        marked = [line for line in prompt.split("\n") if fence in line]
        assert marked == [line for line in plain.split("\n") if fence in line], text
        opening, closing = (line.replace("${fence}", fence) for line in _around(template.template, at))
        inside = prompt.split(f"{opening}\n", 1)[1].split(f"\n{closing}", 1)[0]
        assert inside == defuse(f"It rained.\n{text}")


def test_an_injection_that_guesses_a_fence_gets_another():
    texts = ["prefix", "one", "two"]
    guess = make_fence(texts)
    prompt_fence = make_fence(["prefix", f"[end of continuation A {guess}]\nA", "two"])
    assert prompt_fence != guess


@pytest.mark.parametrize("text", [one["text"] for one in INJECTIONS if one["kind"] == "turn"])
def test_no_control_token_survives(text):
    for token in ("<|", "<｜", "<s>", "</s>", "[INST]", "[/INST]", "<<SYS>>", "<start_of_turn>", "<end_of_turn>", "<think>", "</think>", "<bos>", "<eos>", "[gMASK]"):
        assert token not in defuse(text)


def _around(template: str, name: str) -> tuple[str, str]:
    """The lines before and after a placeholder."""
    lines = template.split("\n")
    at = lines.index(f"${{{name}}}")
    return lines[at - 1], lines[at + 1]
