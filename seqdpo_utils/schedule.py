"""Weights of several aspects, lambda: which of them a listwise stage trains with, and a schedule that learns.

Source of the idea: arXiv 2506.19780, whose public code has a fixed table in its place. Here the schedule is
measured: what a step with some lambda did to held-out margins teaches which lambda comes next.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import pandas as pd

PARTS = 4
"""The lattice of lambdas has steps of 1 / PARTS."""
EXPLORED = 0.25
"""Share of the draws that the schedule leaves to chance."""
PER_STEP = ("uniform", "learned")
"""Kinds that keep one lambda for all lists of an optimiser step, so that its effect can be measured."""


def lattice(aspects: int, *, parts: int = PARTS) -> np.ndarray:
    """All weights of `aspects` aspects that are multiples of 1 / parts, (points, aspects), sums one."""
    counts = itertools.product(range(parts, -1, -1), repeat=aspects)
    return np.array([each for each in counts if sum(each) == parts], dtype=float) / parts


def draw(kind: str, aspects: int, *, key: Sequence[int]) -> np.ndarray:
    """One lambda, determined by `key`: "dirichlet" anywhere on the simplex, else a point of the lattice."""
    rng = np.random.default_rng(list(key))
    return rng.dirichlet(np.ones(aspects)) if kind == "dirichlet" else rng.choice(lattice(aspects))


def features(lambdas: np.ndarray) -> np.ndarray:
    """Scheffé's quadratic polynomial for mixtures: each weight, and each product of two.

    Source: Scheffé 1958, Experiments with mixtures, J. R. Stat. Soc. B 20, 344.
    """
    pairs = itertools.combinations(range(lambdas.shape[1]), 2)
    return np.column_stack([lambdas, *(lambdas[:, i] * lambdas[:, j] for i, j in pairs)])


def predict(
    points: np.ndarray, lambdas: np.ndarray, gains: np.ndarray, errors: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What the measurements say of the gain at some lambdas, and how sure that is.

    Bayesian linear regression on `features`. The noise of each measurement is its own standard error; the
    coefficients are normal around the mean gain, with the standard deviation of the gains, or the smallest of
    their errors where that is larger.

    Args:
        points: (P, m) where to predict.
        lambdas: (n, m) what was measured, n at least one.
        gains, errors: (n) measured gain and its standard error, above zero.

    Returns:
        Mean and standard deviation of the gain at each point.
    """
    weight = 1 / errors**2
    centre = np.average(gains, weights=weight)
    spread = max(gains.std(), errors.min())
    known, asked = features(lambdas), features(points)
    precision = known.T @ (known * weight[:, None]) + np.eye(known.shape[1]) / spread**2
    covariance = np.linalg.inv(precision)
    # the linear part sums to one on the simplex, so a constant needs no column of its own
    mean = covariance @ (known.T @ (weight * (gains - centre)))
    return centre + asked @ mean, np.sqrt(np.einsum("pi,ij,pj->p", asked, covariance, asked))


def believed(
    points: np.ndarray, measured: pd.DataFrame, aspects: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """`predict` from the records of a schedule (`lambda_<aspect>`, `gain`, `error`); zeros where none is."""
    if measured.empty:
        return np.zeros(len(points)), np.zeros(len(points))
    lambdas = measured[[f"lambda_{name}" for name in aspects]].to_numpy()
    return predict(points, lambdas, measured["gain"].to_numpy(), measured["error"].to_numpy())


def chances(means: np.ndarray) -> np.ndarray:
    """How likely each point is drawn: in proportion to its predicted gain above the least, after exploration.

    Args:
        means: predicted gains of the points; equal ones, or none measured yet (zeros), give equal chances.
    """
    above = means - means.min()
    fair = np.full(len(means), 1 / len(means))
    return fair if above.sum() == 0 else (1 - EXPLORED) * above / above.sum() + EXPLORED * fair
