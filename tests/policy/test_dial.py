"""usv/policy/dial.py and usv/sparse/measured.py: any budget of one student, in FLOPs or seconds; what is refused, and in which words."""

import json
import math

import numpy as np
import pytest
import torch
from policy_cases import COSTS, EDGES, LAYERS, known, least_seconds, seeded

from usv.policy.baselines import CalibrationPolicy, HandRulePolicy
from usv.policy.dial import BudgetError, Dial, carried, dial_of, plan_for
from usv.policy.gumbel import GumbelPolicy
from usv.policy.knapsack import by_price, choose
from usv.sparse.measured import FORMAT, CostsError, read_costs
from usv.sparse.plan import DENSITY_LADDER, MERGE_LADDER, RUNGS, Rung, SparsityPlan, timestep_bins

BY_RUNG = dict(zip(RUNGS, COSTS))


def cost(plan: SparsityPlan) -> float:
    return sum(BY_RUNG[r] for row in plan.rungs for r in row) / len(plan.rungs) / plan.num_layers


@pytest.fixture(scope="module")
def record():
    policy = known(GumbelPolicy(EDGES, LAYERS, COSTS, input="none"), torch.rand(3, LAYERS, 10, generator=seeded(), dtype=torch.float64))
    return json.loads(json.dumps(carried(policy, [0.15, 0.6]))), policy


def test_every_budget_decodes_to_what_the_policy_itself_would(record):
    for budget in (0.15, 0.2, 0.333, 0.6):
        plan = plan_for(record[0], EDGES, budget=budget)
        assert budget - 0.1 < cost(plan) <= budget + 1e-9 and cost(plan) == pytest.approx(cost(record[1].decode(budget)), abs=0.02)
    dense = plan_for({**record[0], "budgets": [0.15, 1.0]}, EDGES, budget=1)
    assert {r for row in dense.rungs for r in row} == {Rung()}


@pytest.mark.parametrize("budget", [0, -1, 1, 2, 0.1499, 0.61, math.nan, math.inf, "fast", True])
def test_budgets_out_of_reach_name_what_is_within(record, budget):
    with pytest.raises(BudgetError, match=r"^budget: got .*(accepted: 0\.15 to 0\.6|accepted: a number above 0)") as caught:
        plan_for(record[0], EDGES, budget=budget)
    assert "\n" not in str(caught.value)


def test_a_student_without_damages_keeps_its_own_budget(record):
    with pytest.raises(BudgetError, match="carries no damages"):
        plan_for({"name": "gumbel"}, EDGES, budget=0.2)
    for broken in ({"costs": [1.0]}, {"damage": {"density": [[1]], "merge": []}}, {"densities": None}):
        with pytest.raises(BudgetError, match="not usable"):
            plan_for({**record[0], **broken}, EDGES, budget=0.2)
    for wrong in ({}, {"budget": 0.2, "speedup": 2.0}, {"speedup": 2.0}):
        with pytest.raises(BudgetError):
            plan_for(record[0], EDGES, **wrong)


def test_what_was_not_the_policys_to_decide_is_not_the_dials():
    policy = GumbelPolicy(EDGES, LAYERS, COSTS, input="none", merge_layers=2, most_density=0.3)
    known(policy, torch.rand(3, LAYERS, 10, generator=seeded(1), dtype=torch.float64))
    dial = dial_of(carried(policy, [0.2, 0.9]), EDGES)
    plan = dial.plan(0.5)
    assert all(r.merge == 0 for row in plan.rungs for r in row[2:])
    assert sum(DENSITY_LADDER[r.density] for row in plan.rungs for r in row) / 3 / LAYERS <= 0.3 + 1e-9


# ---- seconds ---------------------------------------------------------------------------------------------------------


def costs_file(path, change=lambda record: None, slow_half=False):
    """A machine on which pruning saves a tenth, merging what it merges, a switch takes half a layer, and density 1/2 may be slower than dense."""
    rungs = [
        {"density": d, "merged": m, "extra_seconds": -(0.1 * (1 - d) + 0.9 * m) if (d, m) != (0.5, 0.0) or not slow_half else 0.2}
        for m in MERGE_LADDER for d in DENSITY_LADDER
    ]  # fmt: skip
    what = {"device": "here", "num_layers": LAYERS}
    record = {"format": FORMAT, "what": what, "dense_seconds": float(LAYERS), "rungs": rungs, "switch_seconds": {"0.25": 0.5, "0.5": 0.5, "0.75": 0.5}}
    change(record)
    path.write_text(json.dumps(record))
    return path


def test_a_speedup_is_decoded_for_the_machine(record, tmp_path):
    costs = read_costs(costs_file(tmp_path / "costs.json"), {"device": "here"})
    assert costs.row_seconds((Rung(),) * 4) == 4.0
    assert costs.row_seconds((Rung(0, 2), Rung(1, 2), Rung(), Rung(0, 1))) == pytest.approx(4 - 0.45 - 0.5 - 0.225 + 2 * 0.5)
    for speedup in (1.2, 1.6, 2.0):
        plan = plan_for(record[0], EDGES, speedup=speedup, costs=costs)
        assert 1 / speedup - 0.12 < costs.plan_cost(plan) <= 1 / speedup + 1e-6, "predicted seconds with switches, not their average"
    with pytest.raises(BudgetError, match=r"speedup: got 50, accepted: 1 to \d"):
        plan_for(record[0], EDGES, speedup=50, costs=costs)
    with pytest.raises(BudgetError, match="speedup: got 'fast'"):
        plan_for(record[0], EDGES, speedup="fast", costs=costs)
    slow = read_costs(costs_file(tmp_path / "slow.json", slow_half=True))
    assert all(r != Rung(1, 0) for row in plan_for(record[0], EDGES, budget=0.9, costs=slow).rungs for r in row), "slower than dense, and no better"


def test_where_sparse_attention_is_dearer_than_dense(tmp_path):
    """The cheapest rungs are then denser than what the student was trained to be: what can be reached is said, or that nothing can."""
    policy = known(GumbelPolicy(EDGES, LAYERS, COSTS, input="none", most_density=0.25), torch.rand(3, LAYERS, 10, generator=seeded(), dtype=torch.float64))
    record = {"name": "gumbel", **carried(policy, [0.6, 1.0])}

    def dearer(by, merged):
        def change(record):
            for rung in record["rungs"]:
                rung["extra_seconds"] = by * (rung["density"] < 1) - merged * rung["merged"]

        return read_costs(costs_file(tmp_path / "costs.json", lambda r: (change(r), r.update(switch_seconds=dict.fromkeys(r["switch_seconds"], 0.0)))), {"device": "here"})

    costs = dearer(0.05, 0.6)
    for speedup in (1.05, 1.3):
        plan = plan_for(record, EDGES, speedup=speedup, costs=costs)
        assert costs.plan_cost(plan) <= 1 / speedup + 1e-6
        assert sum(DENSITY_LADDER[r.density] for row in plan.rungs for r in row) / 3 / LAYERS <= 0.25 + 1e-9
    with pytest.raises(BudgetError, match=r"speedup: got 1.7, accepted: 1 to 1\.\d"):
        plan_for(record, EDGES, speedup=1.7, costs=costs)
    with pytest.raises(BudgetError, match="no plan is as sparse as this student was trained to be"):
        plan_for(record, EDGES, speedup=1.1, costs=dearer(0.5, 0.1))


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda r: r["rungs"].pop(7), "no seconds of density 0.5 with 25% merged"),
        (lambda r: r["rungs"][3].update(extra_seconds=math.nan), "no seconds of density 0.125"),
        (lambda r: r["rungs"][3].update(extra_seconds="x"), "lacks or garbles"),
        (lambda r: r.pop("dense_seconds"), "lacks or garbles 'dense_seconds'"),
        (lambda r: r["switch_seconds"].pop("0.5"), "or of merging"),
        (lambda r: r["what"].update(device="elsewhere"), "measured for device = 'elsewhere', here it is 'here'"),
        (lambda r: r.update(format="x"), "not of the format"),
    ],
)
def test_a_file_that_is_not_of_this_machine_or_not_whole_is_refused(tmp_path, change, says):
    with pytest.raises(CostsError, match=says) as caught:
        read_costs(costs_file(tmp_path / "costs.json", change), {"device": "here"})
    assert "python -m usv.bench costs" in str(caught.value)


def test_no_file_and_no_json_are_refused(tmp_path):
    with pytest.raises(CostsError, match="python -m usv.bench costs"):
        read_costs(tmp_path / "none.json")
    (tmp_path / "text.json").write_text("{")
    with pytest.raises(CostsError, match="not JSON"):
        read_costs(tmp_path / "text.json")


# ---- large tables, and rivals ----------------------------------------------------------------------------------------


def test_large_tables_are_decoded_at_once_and_almost_exactly():
    """30 layers × 50 timesteps: within a hundredth of the gain of what the relaxation bounds, in 50 ms of this process."""
    rng = np.random.default_rng(0)
    size = np.exp(rng.normal(size=(50, 30, 1)))
    damage = size * (1 - np.array(COSTS)) ** 2 / np.array(COSTS) + 0.01 * rng.random((50, 30, len(RUNGS)))
    damage[..., 0] = 0.0
    dial = Dial(timestep_bins(50, 3.0), damage, np.array(COSTS), np.ones(len(RUNGS)), 1.0, (0.1, 1.0))
    plan, lasted = dial.plan(0.2), least_seconds(lambda: dial.plan(0.2))
    value = sum(damage[b, i, RUNGS.index(r)] for b, row in enumerate(plan.rungs) for i, r in enumerate(row))
    prices = np.linspace(0, 40, 2000)
    bound = max(float((damage + p * np.array(COSTS)).min(-1).sum() - p * 0.2 * 1500) for p in prices)  # of any plan at this budget
    assert cost_of(plan) <= 0.2 + 1e-9 and bound <= value <= bound + 0.01 * abs(bound)
    assert lasted < 0.05, f"{1000 * lasted:.0f} ms"


def cost_of(plan):
    return sum(BY_RUNG[r] for row in plan.rungs for r in row) / len(plan.rungs) / plan.num_layers


def test_by_price_is_close_to_exact():
    rng = np.random.default_rng(1)
    for _ in range(20):
        values, costs = -rng.random((40, 6)) * (1 - np.sort(rng.random(6))), np.sort(rng.random(6))
        budget = costs[0] + 0.5 * (costs[-1] - costs[0])
        exact = choose(values, costs, budget, 2000)
        found = by_price(values[None], np.broadcast_to(costs, (1, 40, 6)), budget * 40)[0]
        assert costs[found].sum() <= budget * 40 + 1e-9
        one_cell = (values.max(1) - values.min(1)).max()
        assert values[range(40), found].sum() >= values[range(40), exact].sum() - one_cell


@pytest.mark.parametrize("budget", [0.19, 0.28, 0.5, 0.8, 1.0])
def test_the_hand_rule_has_two_numbers_and_the_cost(budget):
    plan = HandRulePolicy(EDGES, LAYERS, COSTS).decode(budget)
    assert budget - 0.05 < cost(plan) <= budget + 1e-9
    merges = [{r.merge for r in column} for column in zip(*plan.rungs)]
    assert merges[:3] == merges[:1] * 3 and merges[3] == {0}
    assert len({r.density for row in plan.rungs for r in row}) <= 2
    with pytest.raises(ValueError, match=r"policy.budget: got 0.130, but the hand rule's sparsest plan costs 0.18"):
        HandRulePolicy(EDGES, LAYERS, COSTS).decode(0.13)


def test_calibration_learns_layers_and_goes_on_exactly():
    def world(policy, steps, generator):
        for step in range(steps):
            policy.set_budget(0.35)
            d = policy.decide(step % 3, generator)
            size = lambda layer, rung: (0.3 if layer == 1 else 0.03) * (rung.density + rung.merge)  # noqa: E731
            policy.observe(d, {p.layer: size(p.layer, p.other) - size(p.layer, d.rungs[p.layer]) for p in d.probes}, {})
        return policy

    generator = seeded(4)
    policy = world(CalibrationPolicy(EDGES, LAYERS, COSTS), 150, generator)
    plan = policy.decode(0.35)
    assert cost(plan) <= 0.35 + 1e-9
    spent = [sum(BY_RUNG[row[i]] for row in plan.rungs) for i in range(LAYERS)]
    assert spent[1] == max(spent) and spent[1] > 1.3 * sorted(spent)[-2]
    other = CalibrationPolicy(EDGES, LAYERS, COSTS)
    other.load_state_dict(policy.state_dict())
    assert other.decode(0.35) == plan and other.decide(0, seeded(1)) == policy.decide(0, seeded(1))
