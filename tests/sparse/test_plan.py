"""usv/sparse/plan.py: rungs to integers, bins of timesteps, tables, their dict form."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from usv import flow
from usv.sparse.grid import Tile, TokenGrid, tile_layout
from usv.sparse.plan import (
    DENSITY_LADDER,
    MERGE_LADDER,
    RUNGS,
    LayerPlan,
    Rung,
    SparsityPlan,
    bin_of,
    layer_plan,
    merged_tokens,
    timestep_bins,
)


@given(st.integers(1, 700))
def test_every_rung_keeps_enough_and_not_more(num_blocks):
    for rung in RUNGS:
        plan = layer_plan(rung, num_blocks)
        if rung == Rung():
            assert plan is None
            continue
        assert isinstance(plan.num_kept, int) and 1 <= plan.num_kept <= num_blocks
        wanted = DENSITY_LADDER[rung.density] * num_blocks  # a dyadic fraction: exact
        assert plan.num_kept - 1 < max(wanted, 1e-9) <= plan.num_kept
        assert plan.merged_fraction == MERGE_LADDER[rung.merge]


def test_layer_plan_takes_integers_as_they_are():
    plan = LayerPlan.of(0.05, 0.3, 546)
    assert plan == LayerPlan(28, 0.3) and layer_plan(plan, 546) is plan  # 27.3 blocks: at least the density asked for
    assert LayerPlan.of(0.25, 0.0, 8) == layer_plan(Rung(2, 0), 8) and LayerPlan.of(0.001, 0.0, 8).num_kept == 1


def test_rungs_are_all_points_once():
    assert len(RUNGS) == len(set(RUNGS)) == len(DENSITY_LADDER) * len(MERGE_LADDER)
    assert RUNGS[0] == Rung() and DENSITY_LADDER[0] == 1.0 and MERGE_LADDER[0] == 0.0


def test_merged_tokens_of_full_and_partial_tiles():
    layout = tile_layout(TokenGrid(1, 4, 5), Tile(1, 4, 4))  # a tile of 16 and one of 4×1, whose cells have 2 tokens
    assert layout.sizes.tolist() == [16, 4] and layout.num_src.tolist() == [12, 2]
    assert merged_tokens(None, layout) == [0, 0]
    assert merged_tokens(LayerPlan(1, 0.0), layout) == [0, 0]
    assert merged_tokens(LayerPlan(1, 0.25), layout) == [4, 1]
    assert merged_tokens(LayerPlan(1, 0.75), layout) == [12, 2]  # not 3: the partial tile has two sources only


@pytest.mark.parametrize("shift", [1.0, 3.0, 8.0])
@pytest.mark.parametrize("count", [1, 5, 8])
def test_bins_are_equally_likely(count, shift):
    """Timesteps drawn as training draws them, u in [b, b + 1) / count, fall into bin b; the edges are ascending to 1000."""
    edges = timestep_bins(count, shift)
    assert len(edges) == count and edges[-1] == pytest.approx(1000) and list(edges) == sorted(edges)
    generator = torch.Generator().manual_seed(0)
    for b in range(count):
        u = (b + flow.stratified_uniform(64, generator)) / count
        timesteps = 1000 * flow.shift_sigma(u, shift)
        assert {bin_of(float(t), edges) for t in timesteps} == {b}


def test_bin_of_ends_and_edges():
    edges = (250.0, 500.0, 1000.0)
    timesteps = (0.0, 250.0, 250.1, 500.0, 500.1, 999.0, 1000.0, 1000.1)
    assert [bin_of(t, edges) for t in timesteps] == [0, 0, 1, 1, 2, 2, 2, 2]
    assert bin_of(float(torch.tensor(250.0)), edges) == 0
    for count in (3, 6, 8, 12):  # candidate steps are edges, and reach the network in fp32
        edges = timestep_bins(count, 3.0)
        assert [bin_of(float(torch.tensor(edge)), edges) for edge in edges] == list(range(count))


def test_plan_reads_its_row():
    plan = SparsityPlan((400.0, 1000.0), ((Rung(1, 0), Rung(2, 1)), (Rung(), Rung(5, 3))))
    assert plan.at(10.0) == (Rung(1, 0), Rung(2, 1)) and plan.at(400.0) == plan.at(0.0)
    assert plan.at(401.0) == plan.at(1000.0) == (Rung(), Rung(5, 3))
    assert plan.num_layers == 2
    assert plan.merged() == pytest.approx((0 + 0.25 + 0 + 0.75) / 4)
    assert plan.density(64) == pytest.approx((1 / 2 + 1 / 4 + 1 + 1 / 32) / 4)
    assert plan.density(10) == pytest.approx((5 + 3 + 10 + 1) / 40)  # whole blocks: ceil(10/4) = 3, ceil(10/32) = 1


def test_dict_round_trip_through_json():
    edges = timestep_bins(3, 3.0)
    plan = SparsityPlan(edges, tuple(tuple(RUNGS[(5 * i + j) % len(RUNGS)] for j in range(4)) for i in range(3)))
    back = SparsityPlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert back == plan and back.edges == edges


@pytest.mark.parametrize("density, merge", [(6, 0), (-1, 0), (0, 4), (0, -1)])
def test_rungs_beyond_the_ladders_are_refused(density, merge):
    with pytest.raises(ValueError, match=r"rungs: got .*expected density in 0\.\.5 and merge in 0\.\.3"):
        SparsityPlan.from_dict({"edges": [1000.0], "rungs": [[[density, merge]]]})


@pytest.mark.parametrize(
    "edges, rungs",
    [((1000.0,), ((Rung(),), (Rung(),))), ((1000.0, 500.0), ((Rung(),), (Rung(),))), ((500.0, 1000.0), ((Rung(),), (Rung(),) * 2))],
)
def test_tables_that_do_not_fit_are_refused(edges, rungs):
    with pytest.raises(ValueError, match="rungs: got"):
        SparsityPlan(edges, rungs)


def test_uniform():
    plan = SparsityPlan.uniform(Rung(3, 1), (500.0, 1000.0), 4)
    assert {r for row in plan.rungs for r in row} == {Rung(3, 1)} and plan.num_layers == 4
    assert math.isclose(plan.density(32), 1 / 8)


def test_what_a_sampler_of_few_timesteps_runs():
    plan = SparsityPlan((500.0, 800.0, 1000.0), ((Rung(),) * 2, (Rung(1, 0),) * 2, (Rung(2, 2),) * 2))
    two = plan.sampled([1000.0, 750.0])
    assert two.edges == (750.0, 1000.0) and two.rungs == plan.rungs[1:] and two.merged() == 0.25
    assert plan.sampled([1000.0]).density(8) == 1 / 4 and plan.sampled(()) is plan


def test_bins_of_a_part_of_the_noise_levels():
    whole = timestep_bins(4, 3.0)
    assert timestep_bins(2, 3.0, 0.5) == pytest.approx(whole[2:]) and timestep_bins(2, 3.0, end=0.5) == pytest.approx(whole[:2])
