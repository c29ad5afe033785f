"""Runs beside each other: what the page, the pictures and the tables show, and what is refused."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from compared_runs import first_form, next_token, preference, second_form
from report_runs import TEXTS, judged
from test_page import HOSTILE, REPOSITORY, Page

from megatron_sip.report import panels
from megatron_sip.report.arms import arms_of, line_of
from megatron_sip.report.axes import Sizes, axes_of
from megatron_sip.report.comparison import compare, differences, write_comparison
from megatron_sip.report.records import ReportError
from megatron_sip.report.sources import incomparable, read_sources

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> Path:
    """Two runs, one of them with a hostile name and hostile texts, an evaluation of each form; the folder that was written."""
    folder = tmp_path_factory.mktemp("compared")
    hostile = [judged(7, prefix=HOSTILE, texts=tuple(f"{HOSTILE}{i}" for i in range(4)))]
    sip = preference(folder / "sip", f"sip {HOSTILE}", pools=hostile)
    other = preference(folder / "other", "other", "objective.beta=0.3", pools=[judged(7)])
    twin = next_token(folder / "twin")
    (sip / "evaluation.json").write_text(json.dumps(first_form(str(sip / "hf"), str(twin / "hf"))))
    (folder / "more.json").write_text(json.dumps(second_form(str(other / "hf"), "/elsewhere/base/hf")))
    runs = read_sources([str(sip), str(other), str(twin)])
    comparison = compare(runs, evaluations=[folder / "more.json"], sizes=Sizes(judge_parameters=1e9))
    write_comparison(comparison, folder / "out")
    return folder / "out"


def part(page: Page, first: str, last: str | None = None) -> str:
    """Text of the page from ``first`` on; names may have line breaks inside that are no text."""
    plain = "".join(page.parts)
    begin = plain.index(first)
    return plain[begin : plain.index(last, begin)] if last else plain[begin:]


def test_the_page_shows_what_the_runs_wrote(compared):
    page = Page(compared / "comparison.html")
    assert {"Training loss", "Chosen: a rollout", "Ordinary: win rate", "Waiting for the judge", "Peak memory", "Time of a step"} <= set(page.titles)
    assert page.tags.count("input") == 5  # an axis each
    rates = part(page, "Share of prefixes on which A is better", "FLOPs are computed")
    assert "75.0%" in rates and "30 / 0 / 10" in rates and "trained on this" in rates  # 30 of 40 won, none tied
    assert "unsafe prefixes: judge: safety" in rates and "50.0%" in rates and "base/hf" in rates
    assert "Asked in both orders." in rates and "Of the whole evaluation." in rates
    costs = part(page, "FLOPs are computed", "Choose above")
    for shown in ("× 3.00", "12.0", "1,000", "80", "48 s", "16 s"):  # 6 s of a step against 2; 10 tokens x 2 rollouts x 4 pairs; 8 steps of 6 s
        assert shown in costs, shown
    settings = part(page, "Settings that differ", "The prefix on grey")
    assert "objective.beta" in settings and "0.3" in settings and "pool.rollouts" in settings and "train.train_iters" not in settings
    texts = part(page, "The prefix on grey")
    for shown in ("Once upon", "from A", "unsafe A", "Pools of the same pairs", "wiki_text_document, document 7, token 256", TEXTS[2],
                  "step 1 · rollout 0 · rejected"):
        assert shown in texts, shown
    assert "not comparable" not in page.text


def test_the_page_needs_nothing_from_elsewhere_and_text_stays_text(compared):
    page = Page(compared / "comparison.html")
    assert not {"script", "link", "iframe", "img", "object", "embed", "form"} & set(page.tags)
    assert not any(name.startswith("on") or (name in ("src", "href", "xlink:href") and not value.startswith("#")) for name, value in page.attributes)
    assert not any("@import" in text or "url(http" in text for text in page.parts)
    assert "".join(page.parts).count(HOSTILE) >= 6  # names, prefixes, candidates
    assert "Content-Security-Policy" in (compared / "comparison.html").read_text()


def test_pictures_and_tables_stand_beside_the_page(compared):
    pictures = {path.name for path in (compared / "charts").iterdir()}
    assert {"loss.png", "chosen_rollout.png", "evaluation_ordinary_win_rate.png", "win_rates.png"} <= pictures
    assert all(path.read_bytes().startswith(PNG) for path in (compared / "summary.png", *(compared / "charts").iterdir()))
    history = list(csv.DictReader((compared / "history.csv").open(encoding="utf-8")))
    assert {"run": "ntp", "step": "3", "metric": "loss", "value": "4.7"} in history
    assert {"run": "ntp", "step": "3", "metric": "x/wall", "value": "6.0"} in history
    assert {"run": "other", "step": "8", "metric": "x/tokens", "value": "1280.0"} in history
    final = {(row["run"], row["metric"]): float(row["value"]) for row in csv.DictReader((compared / "final.csv").open(encoding="utf-8"))}
    assert final["ntp", "loss"] == pytest.approx(4.2) and final["other", "cost/questions to the judge, a step"] == 12.0
    scored = list(csv.DictReader((compared / "scores.csv").open(encoding="utf-8")))
    assert [(row["measure"], row["win_rate"]) for row in scored][0] == ("judge: quality", "0.75") and len(scored) == 3
    assert sorted(path.name for path in compared.iterdir()) == ["charts", "comparison.html", "final.csv", "history.csv", "scores.csv", "summary.png"]


def test_axes_are_running_totals_and_flops_are_those_of_the_formulas(tmp_path):
    ntp, sip = read_sources([str(next_token(tmp_path / "a")), str(preference(tmp_path / "b"))])
    sizes = Sizes(judge_parameters=1e9, vocab_size=1000)
    plain, judge = axes_of(ntp, sizes), axes_of(sip, sizes)
    assert plain.at["tokens"][8] == 8 * 4 * 40 and plain.at["wall"][8] == 16.0
    # By hand: two layers of 4 x 32^2 and 3 x 32 x 64 weights and norms, a head of 1024 x 32, a final norm; 40 tokens that attend to 20 on average.
    multiplied, attention = 2 * (4 * 32**2 + 3 * 32 * 64 + 2 * 32) + 1024 * 32 + 32, 4 * 2 * 32 * 20
    forward = 2 * multiplied + attention
    assert plain.at["training_flops"][8] == pytest.approx(8 * 4 * 40 * 3 * forward)
    assert plain.at["total_flops"] == plain.at["training_flops"]
    one = judge.flops[8]
    assert one.policy == pytest.approx(2 * 4 * 40 * 3 * forward) and one.reference == pytest.approx(2 * 4 * 40 * forward)  # chosen and rejected
    read, written = 24 * 4 * (2 * multiplied + 4 * 2 * 32 * 12), 2 * 4 * 10 * (2 * multiplied + 4 * 2 * 32 * (24 + 5))
    assert one.rollouts == pytest.approx(read + written)
    # 1,020 tokens through a judge of a billion: 2 FLOPs a parameter (all but the input embedding), and a little attention.
    assert 1020 * 2 * 0.6e9 < one.asked < 1020 * 2 * 1.2e9
    assert judge.at["total_flops"][8] == pytest.approx(8 * (one.policy + one.reference + one.rollouts + one.asked))


def test_x_has_a_readable_unit_and_is_logarithmic_where_arms_go_far_apart(tmp_path):
    ntp, sip = read_sources([str(next_token(tmp_path / "a")), str(preference(tmp_path / "b"))])
    arms, axes = arms_of([ntp, sip], None), {run.name: axes_of(run, Sizes(judge_parameters=1e12)) for run in (ntp, sip)}
    assert panels.scale_of("tokens", arms, axes) == (1.0, "trained tokens") and panels.scale_of("wall", arms, axes) == (1.0, "wall time in seconds")
    assert panels.scale_of("training_flops", arms, axes) == (1e9, "training FLOPs (10⁹)")
    assert panels.scale_of("total_flops", arms, axes) == (1.0, "total FLOPs")  # 10⁸ beside 10¹⁶: as they are, on a logarithmic axis
    loss = next(panel for _, some in panels.panels_of(arms) for panel in some if panel.key == "loss")
    drawn = panels.svg(loss, "total_flops", arms, axes)
    assert "10⁹" in drawn and "10¹⁵" in drawn and "10⁹" not in panels.svg(loss, "step", arms, axes)


def test_a_judge_of_unknown_size_leaves_total_flops_unknown_and_says_so(tmp_path):
    (sip,) = read_sources([str(preference(tmp_path / "b"))])
    axes = axes_of(sip, Sizes())
    assert "total_flops" not in axes.at and "training_flops" in axes.at and "--judge-parameters" in axes.missing["total_flops"]


def test_seeds_of_an_arm_are_a_mean_and_a_band_where_all_have_values(tmp_path):
    folders = [next_token(tmp_path / f"r{seed}", f"ntp_seed{seed}", offset, steps=steps)
               for seed, offset, steps in ((1, 0.0, 8), (2, 1.0, 6), (30, 0.5, 8))]
    runs = read_sources([str(folder) for folder in (*folders, preference(tmp_path / "sip"))])
    arms = arms_of(runs, "name")
    assert [(arm.name, len(arm.members)) for arm in arms] == [("ntp", 3), ("sip", 1)]
    axes = {run.name: axes_of(run, Sizes()) for run in runs}
    line = line_of(arms[0], "loss", "step", axes, smooth=True)
    assert line.x == [1, 2, 3, 4, 5, 6]  # the shortest ends there
    assert line.y == pytest.approx([5.4 - step / 10 + 0.1 for step in line.x]) and line.low == pytest.approx([5.0 - step / 10 for step in line.x])
    assert line.high == pytest.approx([6.0 - step / 10 for step in line.x])
    alone = line_of(arms[1], "loss", "wall", axes, smooth=True)
    assert alone.x[0] == 6.0 and alone.low is None
    assert line_of(arms[0], "chosen/rollout", "step", axes, smooth=True) is None
    by_key = arms_of(runs, "objective.dpo_weight")
    assert [(arm.name, len(arm.members)) for arm in by_key] == [("objective.dpo_weight = 0.0", 3), ("objective.dpo_weight = 1.0", 1)]
    assert any("the runs of ntp end at different steps (ntp_seed1 8, ntp_seed2 6, ntp_seed30 8)" in note for note in compare(runs, group="name").notes)
    assert dict(differences(arms))["objective.dpo_weight"] == ["0.0", "1.0"] and "run.name" not in dict(differences(arms))
    with pytest.raises(ReportError, match="no run has such a setting.*e.g. objective.beta"):
        arms_of(runs, "objective.betta")


@pytest.mark.parametrize("override, says", [
    ("data.prefix_length=20", "cut their pairs differently (data.prefix_length)"),
    ("data.tokenizer_model=other.model", "different tokenizers"),
    ("data.blend=[[1.0, tokens/other]]", "different datasets or weights"),
    ("data.blend=[[1.0, elsewhere/wiki], [2.0, elsewhere/code]]", ""),  # the same weights, and folders of another machine
])
def test_runs_on_other_pairs_or_tokens_are_told(tmp_path, override, says):
    blend = "data.blend=[[1, tokens/wiki], [2, tokens/code]]"
    runs = read_sources([str(next_token(tmp_path / "a", "a", 0.0, blend)), str(next_token(tmp_path / "b", "b", 0.0, blend, override))])
    found = incomparable(runs)
    assert len(found) == bool(says) and all(says in one and "a:" in one and "b:" in one for one in found)


def test_a_tokenizer_is_the_same_by_its_contents(tmp_path):
    for name, content in (("one", b"x"), ("two", b"x"), ("three", b"y")):
        (tmp_path / name).write_bytes(content)
    a, b, c = (next_token(tmp_path / f"run {name}", name, 0.0, f"data.tokenizer_model={tmp_path / name}") for name in ("one", "two", "three"))
    assert incomparable(read_sources([str(a), str(b)])) == []
    assert "different tokenizers" in incomparable(read_sources([str(a), str(c)]))[0]


@pytest.mark.parametrize("content, says", [
    ("{", "cannot be read as an evaluation"), ("[1]", "neither sections nor comparisons"), ('{"format": 3, "sections": [{}]}', "of format 3")])
def test_bad_evaluations_are_named(tmp_path, content, says):
    (tmp_path / "e.json").write_text(content)
    with pytest.raises(ReportError, match=rf"e\.json.*{says}"):
        compare(read_sources([str(next_token(tmp_path / "a"))]), evaluations=[tmp_path / "e.json"])


def test_what_cannot_be_compared_is_refused(tmp_path):
    run, folder = str(next_token(tmp_path / "a")), tmp_path / "empty"
    folder.mkdir()
    (tmp_path / "file.txt").write_text("x")
    damaged = next_token(tmp_path / "damaged")
    (damaged / "metrics.jsonl").write_text('{"step": 1, "loss": 1}\nrubbish\n{"step": 2}\n')
    for specs, names, says in (
        ([str(tmp_path / "nowhere")], [], "nowhere does not exist; give the folder of a run"), ([str(folder)], [], r"metrics\.jsonl does not exist"),
        ([str(tmp_path / "file.txt")], [], "is no run: give the folder"), ([str(damaged)], [], r"metrics\.jsonl, line 2: not JSON"),
        ([run, run], [], "given twice"), ([run], ["a", "b"], "2 names for 1 runs"),
        ([run, str(next_token(tmp_path / "b"))], ["a", "a"], "names must differ"),
    ):
        with pytest.raises(ReportError, match=says):
            read_sources(specs, names)
    with pytest.raises(ReportError, match="no run or group is called so; there are ntp"):
        compare(read_sources([run]), baseline="x")


def test_a_folder_without_settings_still_has_curves_against_steps_and_time(tmp_path):
    run = next_token(tmp_path / "a")
    (run / "run.yaml").unlink()
    comparison = compare(read_sources([str(run)]))
    assert set(comparison.axes["a"].at) == {"step", "wall"} and comparison.baseline is None
    (run / "metrics.jsonl").write_text('{"step": 3, "loss": 1.0}\n{"step": 4, "loss": 1.0, "time/step": 1.0}\n')
    notes = compare(read_sources([str(run)])).notes
    assert "a: 2 of the first 4 steps are not in its history" in notes[-1] and any("some steps have no time/step" in note for note in notes)
    assert any("there is no run.yaml" in warning for warning in comparison.warnings)
    with pytest.raises(ReportError, match="--x tokens: no run has it"):
        write_comparison(comparison, tmp_path / "out", "tokens")
    assert not (tmp_path / "out").exists()


def test_command_line(tmp_path):
    first, second = next_token(tmp_path / "a", "a"), next_token(tmp_path / "b", "b", 0.1, "data.prefix_length=20")
    done = subprocess.run([sys.executable, "tools/compare_runs.py", first, second, "--names", "one", "two", "--x", "wall", "--output", tmp_path / "out"],
                          cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, str(tmp_path / "out" / "comparison.html")), done.stderr
    assert "WARNING: curves are not comparable" in done.stderr
    page = Page(tmp_path / "out" / "comparison.html")
    assert "These curves are not comparable" in page.text and "one" in page.text
    assert ("checked", None) in page.attributes
