"""Studies of papers, one folder each, and what a study of your own is made of.

A study in another package imports these names and is found through the entry-point group ``sharpscope.studies``.
"""

from ..records.history import History
from ..records.run_log import RunLog
from ..report.charts import Chart, SphereChart
from ._framework.claims import Claim, at_least, at_most, labelled, median, under, within
from ._framework.config import demand_positive
from ._framework.fits import line, power, spearman
from ._framework.observe import joined, run
from ._framework.study import Job, Progress

__all__ = [
    "Chart",
    "Claim",
    "History",
    "Job",
    "Progress",
    "RunLog",
    "SphereChart",
    "at_least",
    "at_most",
    "demand_positive",
    "joined",
    "labelled",
    "line",
    "median",
    "power",
    "run",
    "spearman",
    "under",
    "within",
]
