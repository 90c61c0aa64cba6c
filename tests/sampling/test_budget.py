"""usv.enable(…, budget=, speedup=) and usv.set_budget on a student that carries damages; and what is refused, leaving the pipeline alone."""

import math
import sys

import pytest
import tiny
import torch
from dials import save_dial

import usv
from usv.policy.dial import BudgetError
from usv.sampling.generate import load_pipeline
from usv.sparse.measured import CostsError


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A dial, the same student from before damages travelled, and files of costs; see tests/dials.py."""
    folder = tmp_path_factory.mktemp("dial")
    return folder, *save_dial(folder)


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
    from usv.config import InferConfig, SettingError, check_overrides

    with pytest.raises(SettingError, match="budget: got one without ckpt"):
        infer.run(InferConfig(prompt="a cat", budget=0.3, output_dir=str(tmp_path / "out")))
    for budget in (0, 2, math.nan):
        with pytest.raises(SettingError, match="^budget: got .*accepted: "):
            infer.run(InferConfig(prompt="a cat", ckpt=str(folders[0] / "dial"), budget=budget, output_dir=str(tmp_path / "out")))
    with pytest.raises(SettingError, match="^budget=fast: got a word, accepted: a number$"):
        check_overrides(["budget=fast"], InferConfig, {})
    check_overrides(["budget=null", "budget=0.3", "ckpt=fast", "budget=${speedup}"], InferConfig, {})
    assert not (tmp_path / "out").exists()
