"""The report of a run: one HTML file that opens anywhere, made from the files of the workdir alone.

`write_report` may be called while a run goes on, after it, or after a crash: whatever is missing, its section
says so. `load_run` gives the same files to whoever wants to look at them otherwise. `write_predictions_report` makes
such a page of the answers of a prediction.
"""

from pgdist.report.answers import read_rows, write_predictions_report
from pgdist.report.data import load_run
from pgdist.report.picture_table import picture_table
from pgdist.report.render import write_report
from pgdist.report.timing import describe_timing

__all__ = [
    "describe_timing",
    "load_run",
    "picture_table",
    "read_rows",
    "write_predictions_report",
    "write_report",
]
