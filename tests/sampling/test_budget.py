"""usv.enable(…, budget=, speedup=) and usv.set_budget on a student that carries damages; and what is refused, leaving the pipeline alone."""

import json
import math
import sys

import pytest
import tiny
import torch

import usv
from usv.models.forward import SparseTransformer
from usv.policy.dial import BudgetError, carried
from usv.policy.gumbel import GumbelPolicy
from usv.sampling.budget import shape_of
from usv.sampling.checkpoint import Student, save_student
from usv.sampling.generate import load_pipeline
from usv.sparse.cost import ModelShape, plan_cost, rung_costs
from usv.sparse.grid import Tile, tile_layout
from usv.sparse.measured import FORMAT, CostsError, device_name
from usv.sparse.plan import DENSITY_LADDER, MERGE_LADDER, timestep_bins

EDGES = timestep_bins(2, 3.0)
SAMPLING = {
    "height": tiny.SIZE, "width": tiny.SIZE, "num_frames": tiny.FRAMES, "num_inference_steps": 2, "max_sequence_length": tiny.TEXT, "flow_shift": 3.0,
    "guidance_folded_in": 3.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A dial, the same student from before damages travelled, and a file of this machine's costs."""
    folder = tmp_path_factory.mktemp("dial")
    model = SparseTransformer(tiny.make_transformer(seed=5), Tile(*tiny.TILE)).eval()
    layout, shape = tile_layout(model.grid_of((16, tiny.FRAMES, 8, 8)), model.tile), ModelShape.of(model.config, tiny.TEXT)
    policy = GumbelPolicy(EDGES, 2, rung_costs(shape, layout), input="none")
    policy.table.mean.copy_(torch.rand(policy.table.mean.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    policy.table.seen.fill_(19)
    plan = policy.decode(0.8)
    save_student(folder / "dial", Student(model, plan, SAMPLING, {}, {"name": "gumbel", **carried(policy, [0.6, 0.95])}))
    save_student(folder / "old", Student(model, plan, SAMPLING, {}, {"name": "gumbel"}))
    what = {
        "device": device_name(), "num_layers": 2, "transformer": shape_of(model), "tile": list(tiny.TILE), "cell": [1, 2, 2], "height": tiny.SIZE,
        "width": tiny.SIZE, "num_frames": tiny.FRAMES,
    }  # fmt: skip
    rungs = [{"density": d, "merged": m, "extra_seconds": -0.3 * (1 - d) - 0.6 * m} for m in MERGE_LADDER for d in DENSITY_LADDER]
    record = {"format": FORMAT, "what": what, "dense_seconds": 2.0, "rungs": rungs, "switch_seconds": {"0.25": 0.1, "0.5": 0.1, "0.75": 0.1}}
    (folder / "costs.json").write_text(json.dumps(record))
    (folder / "other.json").write_text(json.dumps(record | {"what": what | {"device": "another"}}))
    return folder, lambda p: plan_cost(p, shape, layout), plan


@pytest.fixture(scope="module")
def pipe(tiny_wan):
    return load_pipeline(str(tiny_wan))


def executed(pipe):
    pipe(prompt="a cat", output_type="latent", generator=torch.Generator().manual_seed(0))
    return pipe._usv.student.plan, pipe._usv.record.mean_density(), pipe._usv.record.mean_merged()


def test_the_budget_is_what_runs(pipe, folders):
    folder, cost, own = folders
    try:
        usv.enable(pipe, folder / "dial", budget=0.6)
        sparse = executed(pipe)
        assert 0.5 < cost(sparse[0]) <= 0.6 and cost(sparse[0]) < cost(own)
        pipe._usv.record.reset()
        assert usv.set_budget(pipe, 0.95) is pipe
        dense = executed(pipe)
        assert 0.85 < cost(dense[0]) <= 0.95 and (dense[1] > sparse[1] or dense[2] < sparse[2]), "another plan is executed, not only said"
        assert "timestep" in usv.summary(pipe)
        usv.set_budget(pipe)
        assert pipe._usv.student.plan == own, "no budget: its own"
        usv.set_budget(pipe, speedup=1.3, costs=folder / "costs.json")
        assert pipe._usv.student.plan not in (own, dense[0])
    finally:
        usv.disable(pipe)
    assert usv.summary(pipe).startswith("usv: not enabled")


@pytest.mark.parametrize("budget", [0, 1, 2, math.nan, "fast", 0.5])
def test_bad_budgets_change_nothing(pipe, folders, budget):
    folder, _, own = folders
    before = pipe.transformer
    with pytest.raises(BudgetError, match="^budget: got .*accepted: ") as caught:
        usv.enable(pipe, folder / "dial", budget=budget)
    assert pipe.transformer is before and "\n" not in str(caught.value)
    try:
        usv.enable(pipe, folder / "dial")
        with pytest.raises(BudgetError, match="^budget: got "):
            usv.set_budget(pipe, budget)
        assert pipe._usv.student.plan == own
    finally:
        usv.disable(pipe)


def test_what_cannot_have_a_budget_says_so(pipe, folders):
    folder, _, own = folders
    with pytest.raises(BudgetError, match="carries no damages"):
        usv.enable(pipe, folder / "old", budget=0.7)
    with pytest.raises(BudgetError, match="set_budget: got a pipeline without a student"):
        usv.set_budget(pipe, 0.7)
    with pytest.raises(BudgetError, match="accepted: with a checkpoint alone"):
        usv.enable(pipe, folder / "dial", budget=0.7, attention="svg2")
    with pytest.raises(BudgetError, match="costs: got a file without budget or speedup"):
        usv.enable(pipe, folder / "dial", costs=folder / "costs.json")
    with pytest.raises(CostsError, match="measured for device = 'another'"):
        usv.enable(pipe, folder / "dial", speedup=1.3, costs=folder / "other.json")
    with pytest.raises(BudgetError, match="speedup: got 90, accepted: 1 to "):
        usv.enable(pipe, folder / "dial", speedup=90, costs=folder / "costs.json")
    try:
        usv.enable(pipe, folder / "old")
        assert pipe._usv.student.plan == own, "it still loads, at its own budget"
    finally:
        usv.disable(pipe)


def test_infer_refuses_before_it_loads(folders, tmp_path):
    sys.path.insert(0, str(tiny.ROOT))
    import infer
    from usv.config import InferConfig, SettingError

    with pytest.raises(SettingError, match="budget: got one without ckpt"):
        infer.run(InferConfig(prompt="a cat", budget=0.3, output_dir=str(tmp_path / "out")))
