"""Findings: what is known about a run, in sentences, each with its evidence and with what to do about it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..display import card, table

SEVERITIES = ("note", "advice", "warning", "alarm")
"""From what is good to know to what ends a run."""


@dataclass(frozen=True)
class Finding:
    """A sentence or two on a run.

    `name` identifies its rule and stays the same from version to version; `numbers` are what the rule used, `source`
    whose law it is, `severity` one of `SEVERITIES`, and `remedy` what to change, with numbers where they are known.
    """

    name: str
    text: str
    numbers: Mapping[str, float] = field(default_factory=dict)
    source: str = ""
    severity: str = "note"
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.text} {self.remedy}".rstrip()

    def _repr_html_(self) -> str:
        return Findings([self])._repr_html_()


class Findings(list[Finding]):
    """The findings of one moment: a list, which a notebook shows as a table."""

    def __str__(self) -> str:
        return "\n".join(map(str, self))

    def _repr_html_(self) -> str:
        rows = [(f.severity, f.name, f.text, f.remedy) for f in self]
        return card("Findings", table(("", "finding", "what is known", "what to do"), rows) if rows else "none yet")
