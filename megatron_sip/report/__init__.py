"""What a run did, as one HTML page: curves, comparison, pools to read.

In: run folders with ``metrics.jsonl`` and, where they exist, ``run.yaml``, ``audit.jsonl``, ``evaluation*.json``.
Out: ``report.html`` in the first folder; it needs nothing from the network and shows every text as text.

- ``records``  reads a run folder, whatever is missing or half-written
- ``charts``   the list of charts, and each as inline SVG
- ``tables``   headline, end-of-run figures, evaluation
- ``pools``    which pools are worth reading
- ``page``     puts them into ``page.html.j2`` and writes the file
"""

from megatron_sip.report.page import write_report
from megatron_sip.report.records import ReportError

__all__ = ["ReportError", "write_report"]
