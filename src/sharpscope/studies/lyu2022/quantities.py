"""Quantities and labels that several parts of the study use."""

from .._framework.observe import Quantity, joined, run

LABELS = {
    "step": "step",
    "tau": "τ = lr · wd · steps",
    "spherical_sharpness": "λ1",
    "eta_lambda": "η̃ λ1",
    "loss": "loss",
    "test_loss": "mean squared error on 2000 points",
    "test_accuracy": "fraction of 1297 images",
    "test_rmse": "RMSE / spread",
    "radius": "‖w‖",
    "relative": "λ1 / least λ1",
    "alpha": "α",
    "phi": "φ",
}
"""Labels of the axes of charts, by column."""


def fall(name: str, start: float, end: float) -> Quantity:
    """Factor by which the spherical sharpness of a run falls from one time τ to another."""
    return run(name).at(tau=start)["spherical_sharpness"] / run(name).at(tau=end)["spherical_sharpness"]


def relative_difference(name: str, other: str, *taus: float) -> Quantity:
    """Largest relative difference of the spherical sharpness of two runs at equal τ.

    Of each run the median near τ, since single measurements at the edge scatter by some percent.
    """

    def near(name: str, tau: float) -> Quantity:
        return run(name).near(tau=tau)["spherical_sharpness"].median()

    return joined(*(abs(near(other, tau) / near(name, tau) - 1) for tau in taus)).max()
