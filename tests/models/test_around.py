"""What surrounds a transformer that runs sparsely: autocast, processors set meanwhile, another fine branch; and what is reported of it."""

import pytest
import tiny_pipelines
import torch
from test_students import checkpoints, unguided

import usv
from usv.models.attend import merged_share
from usv.sampling.checkpoint import CheckpointError
from usv.sparse.grid import Tile, TokenGrid, tile_layout
from usv.sparse.plan import Rung

DENSE = {"attention": "tile_top_k", "tile": (1, 2, 2), "dense_layers": 0.0, "dense_steps": 0.0, "density": 1.0}


@pytest.fixture
def hunyuan():
    pipe, call = tiny_pipelines.make("HunyuanVideoPipeline")
    return pipe, unguided(pipe, call)


def test_queries_that_autocast_left_in_fp32(hunyuan):
    """Their norms compute in fp32; values come from a matrix in bf16."""
    pipe, call = hunyuan
    with torch.autocast("cpu", torch.bfloat16):
        own = tiny_pipelines.video(pipe, call)
        for how in (DENSE, {"checkpoint": checkpoints(pipe, Rung(0, 0))}):
            usv.enable(pipe, **how)
            found = tiny_pipelines.video(pipe, call)
            usv.disable(pipe)
            assert (found.float() - own.float()).abs().max() < 0.06 * own.float().abs().max().clamp_min(1)


def test_a_pattern_beside_a_student_of_joint_attention_is_refused_when_it_is_enabled(hunyuan):
    pipe, call = hunyuan
    with pytest.raises(CheckpointError, match="tile_top_k.*over video and text together"):
        usv.enable(pipe, checkpoints(pipe, Rung(1, 0)), attention="tile_top_k")
    assert "not enabled" in usv.summary(pipe)


def test_processors_of_a_pattern_that_was_disabled_refuse_to_run():
    pipe, call = tiny_pipelines.make("WanPipeline")
    usv.enable(pipe, **DENSE)
    tiny_pipelines.video(pipe, call)
    kept = dict(pipe.transformer.attn_processors)
    usv.disable(pipe)
    for block in pipe.transformer.blocks:
        block.attn1.set_processor(kept[next(name for name in kept if "attn1" in name)])
    with pytest.raises(ValueError, match="grid"):
        tiny_pipelines.video(pipe, call)


def test_what_is_reported_as_merged_is_what_partial_tiles_merge():
    whole, partial = (tile_layout(TokenGrid(1, 4, side), Tile(1, 2, 2)) for side in (4, 5))
    assert merged_share(whole, 0.25) == 0.25
    assert merged_share(partial, 0.25) == 4 / 20, "the four tiles of one column have no cell of four"


def test_projections_fused_after_a_student_was_enabled():
    """CogVideoX's fusing sets processors of its own, which cannot read tokens in tiles."""
    pipe, call = tiny_pipelines.make("CogVideoXPipeline")
    call = unguided(pipe, call)
    usv.enable(pipe, checkpoints(pipe, Rung(1, 1)))
    wanted = tiny_pipelines.video(pipe, call)
    pipe.transformer.fuse_qkv_projections()
    assert torch.allclose(tiny_pipelines.video(pipe, call), wanted, atol=1e-5)
