"""What runs did, as HTML pages that need nothing from the network and show every text as text.

In: run folders with ``metrics.jsonl`` and, where they exist, ``run.yaml``, ``audit.jsonl``, ``evaluation*.json``; for comparisons also wandb's logs.
Out: ``report.html`` of one run in its folder (tools/report.py); ``comparison.html`` with pictures and tables (tools/compare_runs.py).

One run:

- ``records``  reads a run folder, whatever is missing or half-written
- ``charts``   the list of charts, and each as inline SVG
- ``tables``   headline, end-of-run figures, evaluation
- ``pools``    which pools are worth reading
- ``page``     puts them into ``page.html.j2`` and writes the file

Runs beside each other:

- ``sources``, ``wandb_log``  what is named on the command line, as runs with names and configurations
- ``axes``, ``arms``          tokens, seconds and FLOPs of each step; seeds of one setting as one curve
- ``panels``                  the charts, one metric each
- ``scores``, ``spending``, ``readings``  win rates with intervals; costs; the same prefixes as each went on
- ``comparison``              puts them into ``compare.html.j2`` and writes page, PNG and CSV
- ``wandb_layout``            the same charts as a report or workspace of a wandb server
"""

from megatron_sip.report.page import write_report
from megatron_sip.report.records import ReportError

__all__ = ["ReportError", "write_report"]
