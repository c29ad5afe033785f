"""The page as a whole: what a run wrote can be read on it, text stays text, and bad folders are named."""

from __future__ import annotations

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_runs import judged

from megatron_sip.report import ReportError, charts, write_report
from megatron_sip.report.records import read_run

REPOSITORY = Path(__file__).resolve().parents[2]
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\" onload='x' &amp; {{ 7*7 }}"


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.titles: list[str] = []
        self.parts: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.text = "\n".join(self.parts)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        if self.tags[-1:] == ["h3"]:
            self.titles.append(data.strip())
        self.parts.append(data)


def titles(page: Page) -> set[str]:
    return {chart.title for section in charts.SECTIONS for chart in section.charts} & set(page.titles)


def test_everything_a_judged_run_wrote_is_on_the_page(make_run):
    path = write_report(make_run())
    page = Page(path)
    assert path.name == "report.html"
    assert {"Held-out suffix loss", "Training loss", "Source of the chosen", "Source of the rejected", "Score spread", "Time of a step",
            "Repetition and copying", "Gradient norm", "Learning rate"} <= titles(page)
    assert page.tags.count("svg") == len(titles(page))
    for shown in ("a run", "20 of 40", "320", "0% (chance 50%)", "4.300 → 4.200", "What came before", "its rewrite", "another rollout",
                  "likelihood -1.000", "step 20", "guard"):
        assert shown in page.text, shown


def test_the_page_needs_nothing_from_elsewhere(make_run):
    page = Page(write_report(make_run()))
    assert not {"script", "link", "iframe", "img", "object", "embed", "form"} & set(page.tags)
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "href", "xlink:href"):
            assert value.startswith("#"), (name, value)
    styles = [value for name, value in page.attributes if name == "style"] + page.parts
    assert not any("@import" in text or "url(http" in text for text in styles)


def test_text_of_runs_stays_text(make_run):
    def hostile(step):
        return [judged(step, prefix=HOSTILE + str(step), texts=(HOSTILE + "o", HOSTILE + "w", HOSTILE + "r", "\x00\u202eend"))]

    clean, run = make_run("clean"), make_run(name=HOSTILE, pools=hostile)
    (run / "evaluation.json").write_text(json.dumps({
        "model_a": HOSTILE, "model_b": "b", "comparisons": [{"name": HOSTILE, "interval": None}], "guarded": {HOSTILE: [0.1, None]},
        "samples": [{"pair": HOSTILE, "prefix": HOSTILE, "a": HOSTILE, "b": "\ud800end"}]}))
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 21, f"pool/dropped/{HOSTILE}": 2}) + "\n")
    page = Page(write_report(run, [clean]))
    assert set(page.tags) <= set(Page(write_report(clean)).tags)
    assert page.text.count(HOSTILE) >= 12  # name, settings, evaluation, drops, prefixes and candidates
    assert "␀⟨U+202E⟩end" in page.text and "⟨U+D800⟩end" in page.text


def test_a_run_without_judge_has_no_empty_charts(make_run):
    page = Page(write_report(make_run(pools=None)))
    assert {"Held-out suffix loss", "Training loss", "Throughput"} <= titles(page)
    assert not {"Source of the chosen", "Judge latency", "DPO margin", "Length of rollouts"} & titles(page)
    assert "Pools to read" not in page.text


def test_metrics_alone_are_enough(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "loss": 2.0}\n')
    page = Page(write_report(tmp_path))
    assert titles(page) == {"Training loss"} and tmp_path.name in page.text


def test_last_record_of_a_step_wins_and_a_torn_line_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "loss": 9}\n{"step": 3, "loss": 9}\n{"step": 2, "loss": 1}\n{"step": 4, "lo')
    assert read_run(tmp_path).steps == {2: {"step": 2.0, "loss": 1.0}, 3: {"step": 3.0, "loss": 9.0}}


def test_values_that_are_no_finite_numbers_count_as_missing(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": NaN, "lr": null, "grad_norm": Infinity, "loss/nll": "x", "wall": true}\n'
                                            '{"step": 2, "loss": 1.5, "grad_norm": 0.0}\n')
    assert read_run(tmp_path).series("loss") == ([2], [1.5])
    assert titles(Page(write_report(tmp_path))) == {"Training loss", "Gradient norm"}  # a norm of 0 has no logarithm, and is drawn


def test_compared_runs_are_told_apart(make_run):
    first, second, third = make_run("one", name="$x_$"), make_run("two", name="$x_$", pools=None), make_run("three", name="_hidden")
    page = Page(write_report(first, [second, third]))
    for label in ("$x_$ (one)", "$x_$ (two)", "hidden"):
        assert page.text.count(label) >= 5, label  # table, note, and legends
    assert not (second / "report.html").exists()


def test_dropped_pairs_come_with_their_reason(make_run):
    page = Page(write_report(make_run(pools=lambda step: [judged(step, values=(1.0, None, 2.0, 3.0)), judged(100 + step, values=(1.0,) * 4)])))
    assert "no_answer: likelihood of rewrite: 0% of its questions answered, quorum 50%" in page.text
    assert "Dropped (no loss at all)" in page.text and "Ties (no DPO loss)" in page.text
    assert "likelihood no answer" in page.text


@pytest.mark.parametrize("name, content, says", [
    ("metrics.jsonl", None, "metrics.jsonl does not exist; give the folder of a run"),
    ("metrics.jsonl", "", "holds no finished step yet"),
    ("metrics.jsonl", '{"step": 1, "lo', "holds no finished step yet"),
    ("metrics.jsonl", '{"step": 1}\nrubbish\n{"step": 2}\n', "metrics.jsonl, line 2: not JSON"),
    ("metrics.jsonl", '{"step": 1}\n[1]\n', "metrics.jsonl, line 2: not a JSON object"),
    ("audit.jsonl", '{"step": 1}\n\xff\n{"step": 2}\n', "audit.jsonl, line 2: not JSON"),
    ("evaluation.json", "{", "evaluation.json is not JSON"),
    ("run.yaml", "a: [", "run.yaml is not YAML"),
])
def test_bad_folders_are_named_and_the_older_page_stays(make_run, name, content, says):
    run = make_run()
    page = write_report(run)
    before = page.read_bytes()
    if content is None:
        (run / name).unlink()
    else:
        (run / name).write_text(content, encoding="latin-1")
    with pytest.raises(ReportError, match=says):
        write_report(run)
    assert page.read_bytes() == before
    assert sorted(p.name for p in run.iterdir() if p.suffix == ".tmp") == []


def test_an_evaluation_is_shown_beside_the_curves(make_run):
    run = make_run()
    (run / "evaluation.json").write_text(json.dumps({
        "model_a": "sip/hf", "model_b": "ntp/hf", "prefixes": 40,
        "comparisons": [{"name": "likelihood", "trained_on": True, "win_rate": 0.613, "interval": [0.47, 0.74], "wins": 24, "ties": 1, "losses": 15,
                         "no_answers": 2, "mean_a": -4.1, "mean_b": -4.6}],
        "statistics": [{"name": "length", "mean_a": 1.0, "mean_b": 2.0}], "originals": {"length": 3.0}, "guarded": {"likelihood": [0.5, 0.25]},
        "samples": [{"pair": "d:1:2", "prefix": "p", "original": "o", "a": "from A", "b": ""}]}))
    text = Page(write_report(run)).text
    for shown in ("61.3%", "47.0% – 74.0%", "24 / 1 / 15", "trained on this", "-4.100", "3.000", "50.0% of A and 25.0% of B", "from A", "nothing"):
        assert shown in text, shown


def test_greedy_and_sampled_evaluations_are_both_shown(make_run):
    run = make_run()
    for name, temperature, rate in (("evaluation", 0, 0.625), ("evaluation_sampled", 1.0, 0.375)):
        tree = {"temperature": temperature, "prefixes": 8, "comparisons": [{"name": "likelihood", "win_rate": rate}]}
        (run / f"{name}.json").write_text(json.dumps(tree))
    text = Page(write_report(run)).text
    assert text.index("Their greedy continuations") < text.index("62.5%") < text.index("Their sampled (temperature 1) continuations") < text.index("37.5%")


def test_sections_of_an_evaluation_are_shown_one_after_the_other(make_run):
    run = make_run()
    sections = [{"name": name, "items": items, "comparisons": [{"name": "quality by M", "win_rate": rate}], "notes": [f"note of {name}"]}
                for name, items, rate in (("ordinary prefixes", 41, 0.625), ("safety: ToxiGen", 43, 0.375))]
    (run / "evaluation.json").write_text(json.dumps({"format": 2, "temperature": 0, "notes": ["of all"], "sections": [*sections, {"name": "empty"}, "no section"]}))
    text = Page(write_report(run)).text
    order = ("of all", "ordinary prefixes: 41", "62.5%", "note of ordinary", "safety: ToxiGen: 43", "37.5%")
    places = [text.index(shown) for shown in order]
    assert places == sorted(places) and "empty" not in text[places[0] : places[-1] + 200]


def test_command_line(make_run, tmp_path):
    run, other = make_run("one"), make_run("two", pools=None)
    done = subprocess.run([sys.executable, "tools/report.py", run, "--compare", other], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, str(run / "report.html")), done.stderr
    refused = subprocess.run([sys.executable, "tools/report.py", tmp_path / "nowhere"], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert refused.returncode == 2 and refused.stderr.startswith("error: ") and "nowhere" in refused.stderr and "Traceback" not in refused.stderr
