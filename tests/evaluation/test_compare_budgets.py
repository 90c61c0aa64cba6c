"""python -m usv.compare_budgets: a dial and its rivals on the same clips, at the costs that they say."""

import json
import sys

import pytest
from dials import save_dial

from usv.evaluation import compare_budgets
from usv.sparse.plan import Rung


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("budgets")
    return folder, save_dial(folder)


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["compare_budgets", *map(str, words)])
    compare_budgets.main()


def test_every_budget_has_its_rows(monkeypatch, folder, tiny_wan, tiny_shards, tmp_path, capsys):
    """The same weights under the same plan err the same, whichever folder they come from; all else is compared at one cost."""
    folder, (cost, own) = folder
    common = ["--model", tiny_wan, "--data", tiny_shards, "--clips", 2]
    run(monkeypatch, "--ckpt", folder / "dial", "--beside", f"old={folder / 'old'}", "--budgets", 0.6, 0.8, 0.95, "--out", tmp_path / "out.json", *common)
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert sorted({row["budget"] for row in rows}) == pytest.approx([0.6, cost(own), 0.8, 0.95], abs=1e-5), "the student beside it adds its own cost"
    for budget in {row["budget"] for row in rows}:
        here = {row["plan"]: row for row in rows if row["budget"] == budget}
        assert {"dial", "uniform"} <= set(here) and "ratio" not in here["dial"]
        assert here["dial"]["cost"] <= budget + 1e-5 and all(abs(row["cost"] - budget) < 0.15 for row in here.values())
        for row in here.values():
            if "ratio" in row:
                assert row["interval"][0] <= row["ratio"] <= row["interval"][1]
                assert row["ratio"] == pytest.approx(row["error"] / here["dial"]["error"], rel=1e-3)
    own_plan = next(row for row in rows if row["plan"] == "dial" and row["budget"] == 0.8)  # what both folders were saved with
    assert next(row for row in rows if row["plan"] == "old")["error"] == own_plan["error"] > 0
    assert "over the dial" in capsys.readouterr().out


def test_rivals_have_the_cost_and_the_hand_rule_stays_away_where_it_cannot(folder):
    folder, (cost, _) = folder
    from tiny import make_transformer

    from usv.evaluation.compare_budgets import plans_at
    from usv.sampling.checkpoint import load_student

    dial = load_student(folder / "dial", make_transformer())
    costs = dial.policy["costs"]
    assert set(plans_at(dial, 0.95, costs)) >= {"dial", "uniform"}
    assert all(cost(plan) <= 0.95 + 0.05 for plan in plans_at(dial, 0.95, costs).values())
    assert plans_at(dial, 0.95, costs)["dial"].rungs != ((Rung(),) * 2,) * 2


@pytest.mark.parametrize(
    "words, says",
    [
        (["--budgets", "0.5"], "BudgetError: budget: got 0.5, accepted: 0.6 to 0.95"),
        (["--clips", "500"], "DataError: .* samples of split 'val' make no batch of 500"),
        (["--budgets", "2"], "--budgets: got 2.0, accepted: "),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_one_line(monkeypatch, folder, tiny_wan, tiny_shards, words, says):
    with pytest.raises(SystemExit, match=says):
        run(monkeypatch, "--ckpt", folder[0] / "dial", "--model", tiny_wan, "--data", tiny_shards, "--clips", 2, "--budgets", 0.8, *words)
    with pytest.raises(SystemExit, match="carries no damages"):
        run(monkeypatch, "--ckpt", folder[0] / "old", "--model", tiny_wan, "--data", tiny_shards, "--clips", 2, "--budgets", 0.8)
