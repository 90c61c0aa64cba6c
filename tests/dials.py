"""A tiny student that carries damages, the same from before damages travelled, and files of costs, for tests of budgets."""

import json

import tiny
import torch

from usv.models.forward import SparseTransformer
from usv.policy.dial import carried
from usv.policy.gumbel import GumbelPolicy
from usv.sampling.budget import shape_of
from usv.sampling.checkpoint import Student, save_student
from usv.sparse.cost import ModelShape, plan_cost, rung_costs
from usv.sparse.grid import Tile, tile_layout
from usv.sparse.measured import FORMAT, device_name
from usv.sparse.plan import DENSITY_LADDER, MERGE_LADDER, timestep_bins

EDGES = timestep_bins(2, 3.0)
SAMPLING = {
    "height": tiny.SIZE, "width": tiny.SIZE, "num_frames": tiny.FRAMES, "num_inference_steps": 2, "max_sequence_length": tiny.TEXT, "flow_shift": 3.0,
    "guidance_folded_in": 3.0,
}  # fmt: skip


def save_dial(folder):
    """FOLDER/dial of budgets 0.6 to 0.95, FOLDER/old without damages, costs.json of this machine, other.json of another; the cost of a plan as a
    function, and the plan of both."""
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
    return lambda p: plan_cost(p, shape, layout), plan
