"""The report of a run: one HTML file that opens anywhere, made from the files of the workdir alone.

`write_report` may be called while a run goes on, after it, or after a crash: whatever is missing, its section
says so.
"""

from pgdist.report.render import write_report

__all__ = ["write_report"]
