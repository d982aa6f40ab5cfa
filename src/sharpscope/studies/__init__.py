"""Studies of papers, one folder each, and what a study of your own is made of.

A study in another package imports these names and is found through the entry-point group ``sharpscope.studies``.
"""

from ..records.history import History
from ..records.run_log import RunLog
from ..report.charts import Chart, SphereChart
from ._framework.claims import (
    Claim,
    comparison,
    control,
    identity,
    inequality,
    labelled,
    scaling,
    under,
    wider_claim,
)
from ._framework.config import demand_positive
from ._framework.fits import line, power, spearman
from ._framework.observe import joined, measured, run
from ._framework.study import Job, Progress

__all__ = [
    "Chart",
    "Claim",
    "History",
    "Job",
    "Progress",
    "RunLog",
    "SphereChart",
    "comparison",
    "control",
    "demand_positive",
    "identity",
    "inequality",
    "joined",
    "labelled",
    "line",
    "measured",
    "power",
    "run",
    "scaling",
    "spearman",
    "under",
    "wider_claim",
]
