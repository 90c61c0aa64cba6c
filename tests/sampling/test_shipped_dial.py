"""data/students/usv_dial: it loads on the embedded model and executes every budget that it was trained for."""

import pytest
import torch
from embedded import WAN_MINI, wan_mini

import usv
from usv.policy.dial import BudgetError
from usv.sampling.budget import plan_at
from usv.sampling.checkpoint import load_student
from usv.sparse.cost import ModelShape, rung_flops
from usv.sparse.grid import tile_layout
from usv.sparse.plan import LayerPlan, Rung, layer_plan

DIAL = WAN_MINI.parent / "students" / "usv_dial"


@pytest.fixture(scope="module")
def world():
    pipe, _ = wan_mini()
    return pipe, load_student(DIAL, pipe.transformer)


def executed_cost(student, plan):
    """FLOPs of one forward in every bin as it ran, blocks counted in its attention, as a share of the dense one's."""
    s, latents = student.sampling, torch.randn(1, 16, 9, 24, 24, generator=torch.Generator().manual_seed(0))
    text = torch.randn(1, s["max_sequence_length"], student.model.config["text_dim"], generator=torch.Generator().manual_seed(1))
    layout, shape = tile_layout(student.model.grid_of(latents.shape), student.model.tile), ModelShape.of(student.model.config, s["max_sequence_length"])
    spent = 0.0
    for edge, row in zip(plan.edges, plan.rungs):
        with torch.no_grad():
            stats = student.model(latents, torch.tensor([edge]), text, row)[1]
        for layer, rung in enumerate(row):
            fraction = 0.0 if rung == Rung() else layer_plan(rung, layout.num_blocks).merged_fraction
            ran = LayerPlan(round(float(stats[layer].density) * layout.num_blocks), fraction) if layer in stats else rung
            spent += rung_flops(shape, layout, ran)
    return spent / rung_flops(shape, layout, Rung()) / len(plan.edges) / plan.num_layers


@pytest.mark.parametrize("budget", [0.15, 0.2, 0.28, 0.4, 0.6])
def test_every_budget_is_executed(world, budget):
    """Within 2% of what was asked, and never above it."""
    _, student = world
    cost = executed_cost(student, plan_at(student, student.plan, budget))
    print(f"budget {budget}: {cost:.4f} executed")
    assert 0.98 * budget <= cost <= budget + 1e-6


def test_a_pipeline_changes_budgets_without_loading(world):
    """And what is out of reach is said with what is within."""
    pipe, student = world
    usv.enable(pipe, student, budget=0.2)
    try:
        weights = pipe.transformer
        usv.set_budget(pipe, 0.6)
        assert pipe.transformer is weights and pipe._usv.student.plan == plan_at(student, student.plan, 0.6)
        with pytest.raises(BudgetError, match=r"budget: got 0.1, accepted: 0\.15 to 0\.6"):
            usv.set_budget(pipe, 0.1)
    finally:
        usv.disable(pipe)
