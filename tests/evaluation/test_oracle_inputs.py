"""usv/evaluation/oracle_inputs.py on errors that are known: what a plan of its own can give, and that noise is no input."""

import numpy as np
import pytest

from usv.evaluation import oracle_inputs
from usv.sparse.plan import RUNGS, Rung, timestep_bins

CLIPS, LAYERS, EDGES = 6, 3, timestep_bins(2, 1.0)
COSTS = [1 - 0.6 * r.density / 5 - 0.3 * r.merge / 3 for r in RUNGS]


def cost_of(plan):
    return sum(COSTS[RUNGS.index(r)] for row in plan.rungs for r in row) / len(plan.rungs) / LAYERS


def world(sensitive, noise=0.0, seed=0):
    """errors(bin, row, clips): clip i suffers ten times as much in the layer `sensitive(i)`."""
    rng = np.random.default_rng(seed)

    def errors(bin, row, clips):
        found = []
        for clip in range(CLIPS)[clips]:
            scale = [10.0 if layer == sensitive(clip) else 1.0 for layer in range(LAYERS)]
            rungs = row or (Rung(),) * LAYERS
            found.append(0.1 + sum(s * (0.01 * r.density + 0.02 * r.merge) for s, r in zip(scale, rungs)) + noise * rng.normal())
        return np.array(found)

    return errors


def test_clips_that_differ_gain_by_plans_of_their_own():
    errors = world(lambda clip: clip % LAYERS)
    rows = oracle_inputs.compare(errors, errors, CLIPS, EDGES, LAYERS, COSTS, 0.5, cost_of)["rows"]
    assert rows["one plan"]["gain"] == 0 and rows["own plan"]["gain"] > 0.2 and rows["own plan, one price"]["gain"] >= rows["own plan"]["gain"] - 0.02
    assert all(row["cost"] <= 0.5 + 1e-6 for row in rows.values())
    assert rows["own plan"]["interval"][0] > 0


def test_clips_that_are_alike_gain_nothing_and_noise_is_no_gain():
    errors = world(lambda clip: 1)
    rows = oracle_inputs.compare(errors, errors, CLIPS, EDGES, LAYERS, COSTS, 0.5, cost_of)["rows"]
    assert rows["own plan"]["gain"] == pytest.approx(0, abs=1e-9)
    rows = oracle_inputs.compare(world(lambda clip: 1, 0.02, 1), world(lambda clip: 1, 0.0, 2), CLIPS, EDGES, LAYERS, COSTS, 0.5, cost_of)["rows"]
    assert rows["own plan"]["gain"] < 0.02, "plans fitted to noise are no better on other noise"
