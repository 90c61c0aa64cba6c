"""The comparison of policies: what it concludes from the runs, and that it runs all of them."""

import json

from usv.evaluation import compare_policies


def cell(error: float, cost: float = 0.25) -> dict:
    return {"velocity_error": error, "weighted_error": 1 - error, "plan_cost": cost, "plan_density": 0.2, "plan_merged": 0.4}


def test_wins_are_counted_seed_by_seed():
    runs = {"gumbel": [cell(0.1), cell(0.3)], "static": [cell(0.2), cell(0.2)], "entropy": [cell(0.15), cell(0.35)]}
    rows = compare_policies.summarise(runs)
    assert (rows["static"]["learned_is_better_in"], rows["entropy"]["learned_is_better_in"]) == (1, 2)
    assert (rows["static"]["learned_is_better_weighted_in"], rows["entropy"]["learned_is_better_weighted_in"]) == (1, 0)
    assert rows["gumbel"]["velocity_error_mean"] == 0.2 and rows["gumbel"]["weighted_error_mean"] == 0.8
    assert "0.2000" in compare_policies.table(rows)


def test_every_policy_runs_with_every_seed_and_its_share_of_the_cores(tmp_path, monkeypatch):
    seen = []

    def run(policy, seed, steps, folder, settings, threads):
        seen.append((policy, seed, steps, settings, threads))
        return cell(0.1 + seed / 10 + len(policy) / 100)

    monkeypatch.setattr(compare_policies, "run", run)
    monkeypatch.setattr(compare_policies.os, "cpu_count", lambda: 6)
    out = tmp_path / "report.json"
    words = ["compare_policies", "--steps", "7", "--seeds", "2", "--jobs", "2", "--out", str(out), "--", "policy.budget=0.3"]
    monkeypatch.setattr(compare_policies.sys, "argv", words)
    compare_policies.main()
    assert sorted(seen) == [(p, s, 7, ["policy.budget=0.3"], 3) for p in sorted(compare_policies.POLICIES) for s in (0, 1)]
    report = json.loads(out.read_text())
    assert report["seeds"] == 2 and report["rows"]["gumbel"]["learned_is_better_in"] == 0
    assert [r["velocity_error"] for r in report["runs"]["static"]] == [0.16, 0.26]


def test_pairs_tell_more_than_means():
    """A rival that is 10% worse everywhere, among seeds and bins that differ by far more, is worse with certainty; one that is not, is not."""
    scale = [[1.0, 5.0, 0.2], [2.0, 8.0, 0.5], [0.7, 3.0, 0.1]]
    runs = lambda factor: [cell(0.1) | {"by_bin": {f"bin_{i}": f(factor, i) * x for i, x in enumerate(row)}} for row in scale]  # noqa: E731
    f = lambda factor, i: factor  # noqa: E731
    rows = compare_policies.summarise({"gumbel": runs(1.0), "static": runs(1.1)})
    assert rows["static"]["ratio"] == 1.1 and rows["static"]["interval"] == [1.1, 1.1] and "1.100 [1.100, 1.100]" in compare_policies.table(rows)
    f = lambda factor, i: factor if i else 1 / factor**2  # noqa: E731
    low, high = compare_policies.summarise({"gumbel": runs(1.0), "static": runs(1.1)})["static"]["interval"]
    assert low < 1 < high


def test_inputs_of_the_learned_policy_are_compared_too(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(compare_policies, "run", lambda policy, *rest: seen.append(policy) or cell(0.1))
    words = ["compare_policies", "--seeds", "1", "--policies", "gumbel", "hand_rule", "--inputs", "place", "none", "--", "optim.batch_size=2"]
    monkeypatch.setattr(compare_policies.sys, "argv", words)
    compare_policies.main()
    assert sorted(seen) == ["gumbel/none", "gumbel/place", "hand_rule"]
