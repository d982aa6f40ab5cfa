"""Charts as data, figures, and the pages that a person looks at."""

from .charts import Chart, SphereChart
from .figures import figure, save_figures
from .html import render, write_page, write_report

__all__ = [
    "Chart",
    "SphereChart",
    "figure",
    "render",
    "save_figures",
    "write_page",
    "write_report",
]
