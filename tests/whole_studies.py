"""A study from its jobs to its verdicts, in memory."""

from typing import Any

from sharpscope.records.history import History


class Log:
    """The rows that the jobs of a study write."""

    def __init__(self, run: str, rows: list[dict[str, Any]]) -> None:
        self.run, self.rows = run, rows

    def resume(self) -> dict[str, Any]:
        return {}

    def append(self, **row: Any) -> None:
        self.rows.append({"run": self.run, **row})


def made(study: Any, name: str, config: Any) -> History:
    """Do all jobs; every run that a claim or a chart reads has to be there, and every claim to come to a verdict."""
    rows: list[dict[str, Any]] = []
    for job in study.jobs(config):
        job.work(Log(job.name, rows), lambda done: None, **job.arguments)
    history = History(rows)
    for claim in study.CLAIMS:
        assert {*claim.runs} <= {*history.runs}, claim.sentence
        claim.decide(name, history, config)
    for chart in study.CHARTS:
        assert {*chart.runs} <= {*history.runs}, chart.name
    return history
