"""Sends measurements to an MLflow run, as metrics.

from sharpscope.integrations.mlflow import sink

with mlflow.start_run() as run:
    monitor = Monitor(f, optimizer, sinks=[sink(run)])
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..monitoring import Sink
from . import named

if TYPE_CHECKING:
    from mlflow.entities import Run


def sink(run: "Run") -> Sink:
    """Make a sink that writes to `run`, be it the active one or not."""
    import mlflow

    def send(step: int, values: Mapping[str, float]) -> None:
        mlflow.log_metrics(named(values), step=step, run_id=run.info.run_id)

    return send
