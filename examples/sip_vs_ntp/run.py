#!/usr/bin/env python3
"""Self-improving pretraining against next-token prediction, on two CPU cores, from nothing to the table: one command, resumable.

    python examples/sip_vs_ntp/run.py --work DIR [--seeds 1 2 3] [--until STAGE]

In: nothing but packages (prepare.py) and the quickstart's teacher, which evaluates and trains nothing. Out, in DIR:

    text/         speeches, tokenizer, datasets                                    prepare.py, tools/preprocess_data.py
    base/         the common checkpoint, next-token prediction                     base.yaml
    judge/        what the runs are judged by: the base trained by GRPO            judge_samples.py, judge.yaml
    ARM_seedN/    runs from the common checkpoint, on the same pairs               ntp.yaml, rfnll.yaml, blend.yaml
    evaluation/   ARM_seedN_HOW.json: against ntp_seedN on held-out prefixes       tools/evaluate.py
    results.md, comparison/                                                        results.py, tools/compare_runs.py

Every stage is skipped if its result is there; a run goes on from its last checkpoint. Ctrl-C or TERM stops in order (exit code 85).
Two arms more: ``ntp_compute`` is ntp with as many steps as take the time of ``blend``; ``blend_untrained`` is blend with the judge from before
GRPO.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))

from megatron_sip.training.checkpoint_files import newest  # noqa: E402

ARMS = {"ntp": "ntp.yaml", "rfnll": "rfnll.yaml", "blend": "blend.yaml", "blend_untrained": "blend.yaml", "ntp_compute": "ntp.yaml"}
# How held-out prefixes are continued and compared: name -> flags of tools/evaluate.py, and for which arms. A language model that trained nothing
# takes a second or so a continuation, so it sees fewer of them.
EVALUATIONS = {
    "greedy": (["--pairs", "150"], list(ARMS)),
    "sampled": (["--pairs", "150", "--temperature", "1"], ["blend", "rfnll"]),
    "likelihood": (["--pairs", "64"], ["blend", "rfnll"]),
    "same_time": (["--pairs", "64"], ["blend"]),  # the same, against ntp_compute
}
STAGES = ("text", "base", "judge", "runs", "evaluation", "results")
DATASETS = ("base", "base_unsafe", "policy", "policy_unsafe", "held_out", "held_out_unsafe")
UNSAFE_SHARE = 0.34  # of the pairs; as there are tokens


class Stopped(Exception):
    """A command ended with ``code``; what it wrote is kept."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="everything goes here (about 2 GB)")
    parser.add_argument(
        "--evaluator",
        type=Path,
        default=ROOT / "work_data" / "teacher",
        metavar="HF_DIR",
        help="model that evaluates, of examples/fetch_teacher.py (default: %(default)s)",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1], help="last stage (default: all)")
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help="for all runs from the common checkpoint")
    options = parser.parse_intermixed_args()
    if not (options.evaluator / "config.json").exists():
        parser.error(f"{options.evaluator} holds no model; python examples/fetch_teacher.py --output {options.evaluator}")
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    experiment = Experiment(options)
    try:
        for stage in STAGES[: STAGES.index(options.until) + 1]:
            getattr(experiment, stage)()
    except Stopped as stop:
        what = "stopped; start the same command again to go on" if stop.code == 85 else "a command failed; its message is above"
        print(what, file=sys.stderr)
        return stop.code
    except KeyboardInterrupt:
        return 85
    return 0


class Experiment:
    """The stages, in order; each leaves folders that tell that it is done."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.work = options, options.work.resolve()
        self.tokenizer = self.work / "text" / "tokenizer.model"

    def text(self) -> None:
        text = self.work / "text"
        self.python(HERE / "prepare.py", "--output", text)
        for name in DATASETS:
            if not (text / f"{name}_text_document.json").exists():
                self.python(
                    ROOT / "tools" / "preprocess_data.py",
                    "--input",
                    text / f"{name}.jsonl",
                    "--output-prefix",
                    text / name,
                    "--tokenizer-model",
                    self.tokenizer,
                    "--append-eod",
                    "--workers",
                    "2",
                )

    def base(self) -> None:
        self.train(HERE / "base.yaml", self.work / "base", [self.blend("base")])
        self.export(self.work / "base")

    def judge(self) -> None:
        start, judge = self.work / "judge_start", self.work / "judge"
        if not (start / "data" / "valid.jsonl").exists():
            self.python(HERE / "judge_start.py", "--base", self.work / "base" / "hf", "--text", self.work / "text", "--output", start)
        if not judge.exists():
            self.python(
                ROOT / "tools" / "train_teacher.py",
                "--config",
                HERE / "judge.yaml",
                "--model",
                start / "model",
                "--data",
                start / "data",
                "--output",
                judge,
                f"run.dir={quoted(self.work / 'judge_run')}",
            )

    def runs(self) -> None:
        for seed in self.options.seeds:
            for arm in self.options.arms:
                run, more = self.run_of(arm, seed), []
                if arm == "ntp_compute":
                    more = [f"train.train_iters={self.steps_of_equal_time(seed)}"]
                elif arm != "ntp":
                    judge = self.work / "judge_start" / "model" if arm == "blend_untrained" else self.work / "judge"
                    more = [f"teacher.model={quoted(judge)}"]
                self.train(
                    HERE / ARMS[arm],
                    run,
                    [
                        self.blend("policy"),
                        f"model.init_from={quoted(self.work / 'base' / 'hf')}",
                        f"run.seed={seed}",
                        f"run.name={run.name}",
                        *more,
                        *self.options.overrides,
                    ],
                )
                self.export(run)

    def evaluation(self) -> None:
        """Arms against ``ntp`` (or ``ntp_compute``) of their seed; the judges of the runs are refused as evaluators by the tool itself."""
        text = self.work / "text"
        asked = ["--evaluator", f"{{kind: likelihood, name: another language model, model: {quoted(self.options.evaluator)}}}"]
        for how, (flags, arms) in EVALUATIONS.items():
            evaluator = asked if how in ("likelihood", "same_time") else ["--no-judge"]
            other = "ntp_compute" if how == "same_time" else "ntp"
            for seed in self.options.seeds:
                for arm in self.options.arms:
                    report, run = self.work / "evaluation" / f"{arm}_seed{seed}_{how}.json", self.run_of(arm, seed)
                    if (
                        arm == "ntp"
                        or arm not in arms
                        or report.exists()
                        or not all((one / "hf").exists() for one in (run, self.run_of(other, seed)))
                    ):
                        continue
                    self.python(
                        ROOT / "tools" / "evaluate.py",
                        run,
                        "--against",
                        self.run_of(other, seed),
                        "--config",
                        HERE / "ntp.yaml",
                        f"data.tokenizer_model={quoted(self.tokenizer)}",
                        f"data.blend=[[1.0, {quoted(text / 'held_out_text_document')}]]",
                        "data.split=5,95",
                        f"run.seed={seed}",
                        *flags,
                        *evaluator,
                        "--show",
                        "0",
                        "--output",
                        report,
                        "--unsafe-data",
                        text / "held_out_unsafe_text_document",
                    )

    def results(self) -> None:
        self.python(HERE / "results.py", "--work", self.work)
        runs = [self.run_of(arm, seed) for arm in self.options.arms for seed in self.options.seeds if (self.run_of(arm, seed) / "hf").exists()]
        reports = sorted((self.work / "evaluation").glob("*_likelihood.json"))  # all of them make a plot of a hundred lines; results.png pools them
        self.python(
            ROOT / "tools" / "compare_runs.py",
            *runs,
            "--group",
            "name",
            "--output",
            self.work / "comparison",
            "--title",
            "Self-improving pretraining against next-token prediction, two CPU cores",
            *(["--evaluations", *reports] if reports else []),
        )

    def run_of(self, arm: str, seed: int) -> Path:
        return self.work / f"{arm}_seed{seed}"

    def blend(self, part: str) -> str:
        text = self.work / "text"
        return (
            f"data.blend=[[{1 - UNSAFE_SHARE:g}, {quoted(text / f'{part}_text_document')}], "
            f"[{UNSAFE_SHARE:g}, {quoted(text / f'{part}_unsafe_text_document')}]]"
        )

    def steps_of_equal_time(self, seed: int) -> int:
        """Steps of next-token prediction in the time of ``blend``: its steps times the ratio of median step times."""
        blend, ntp = (step_seconds(self.run_of(arm, seed)) for arm in ("blend", "ntp"))
        return round(len(blend) * middle(blend) / middle(ntp))

    def train(self, config: Path, run: Path, settings: list[str]) -> None:
        if not (run / "hf").exists():
            self.python(
                "-m", "megatron_sip.train", "--config", config, f"run.dir={quoted(run)}", f"data.tokenizer_model={quoted(self.tokenizer)}", *settings
            )

    def export(self, run: Path) -> None:
        if not (run / "hf").exists():
            self.python(ROOT / "tools" / "export_hf.py", newest(run), "--output", run / "hf")

    def python(self, *arguments: object) -> None:
        """Run to the end, in a process group that a stop reaches."""
        command = [sys.executable, *map(str, arguments)]
        print(f"[{time.strftime('%H:%M:%S')}] {shlex.join(command[1:])}", flush=True)
        environment = os.environ | {"TORCHDYNAMO_DISABLE": "1", "PYTHONPATH": str(ROOT)}
        child = subprocess.Popen(command, cwd=ROOT, env=environment)
        stopped = False
        while True:
            try:
                code = child.wait()
                break
            except KeyboardInterrupt:
                stopped = True
                child.send_signal(signal.SIGTERM)
        if stopped:
            raise Stopped(85)
        if code:
            raise Stopped(code if code > 0 else 128 - code)


def step_seconds(run: Path) -> list[float]:
    """Wall-clock seconds of each step."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["time/step"] for line in lines]


def middle(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def quoted(path: Path) -> str:
    """A path as YAML."""
    return json.dumps(str(path))


if __name__ == "__main__":
    sys.exit(main())
