"""Patterns beside what else is done to a diffusers pipeline: compiling, copying, sharing, offloading, splitting over ranks."""

import copy
from types import SimpleNamespace

import diffusers
import pytest
import tiny_pipelines
import torch
from torch._dynamo.utils import counters

import usv
from usv.patterns import CallStats
from usv.sampling.patterns import KEPT_CALLS, PatternRecord

PATTERN = {"attention": "tile_top_k", "tile": (1, 2, 2), "density": 0.5, "dense_layers": 0.0}
ALL = {**PATTERN, "dense_steps": 0.0}


@pytest.fixture
def three():
    """A pipeline, its call, its own latents and those under the pattern."""
    pipe, call = tiny_pipelines.make("WanPipeline")
    own = tiny_pipelines.video(pipe, call)
    usv.enable(pipe, **ALL)
    sparse = tiny_pipelines.video(pipe, call)
    usv.disable(pipe)
    return pipe, call, own, sparse


@pytest.mark.parametrize(("name", "graphs"), [("WanPipeline", 1), ("LTXConditionPipeline", 1), ("HunyuanVideoPipeline", 4)])
def test_compiled_blocks_are_whole_graphs_and_one_for_all_layers(name, graphs):
    """HunyuanVideo has two kinds of blocks, and a text refiner."""
    torch._dynamo.reset()
    counters.clear()
    pipe, call = tiny_pipelines.make(name)
    usv.enable(pipe, **ALL)
    expected = tiny_pipelines.video(pipe, call)
    pipe._usv.record.reset()
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert torch.equal(tiny_pipelines.video(pipe, call), expected)
    assert counters["stats"]["unique_graphs"] == graphs and not counters["graph_break"]
    assert len(pipe._usv.record.calls) == pipe._usv.record.forwards * len(pipe._usv.attached[0].attentions)
    torch._dynamo.reset()


def test_a_compiled_transformer(three):
    pipe, call, own, sparse = three
    torch._dynamo.reset()
    pipe.transformer = torch.compile(pipe.transformer, backend="eager", fullgraph=True)
    usv.enable(pipe, **ALL)
    assert torch.equal(tiny_pipelines.video(pipe, call), sparse) and len(pipe._usv.record.calls) == 8
    usv.disable(pipe)
    assert torch.equal(tiny_pipelines.video(pipe, call), own)
    torch._dynamo.reset()


def test_a_deep_copy_is_its_own(three):
    pipe, call, own, sparse = three
    usv.enable(pipe, **ALL)
    twin, alone = copy.deepcopy(pipe), copy.deepcopy(pipe.transformer)
    assert torch.equal(tiny_pipelines.video(twin, call), sparse)
    assert (len(pipe._usv.record.calls), len(twin._usv.record.calls)) == (0, 8)
    assert {block.attn1.processor.run for block in alone.blocks} == {alone._usv_pattern.run} != {pipe._usv.attached[0].run}
    usv.disable(twin)
    assert torch.equal(tiny_pipelines.video(twin, call), own) and torch.equal(tiny_pipelines.video(pipe, call), sparse)


def test_pipelines_that_share_a_transformer_share_its_pattern(three):
    pipe, call, own, sparse = three
    usv.enable(pipe, **ALL)
    sibling = diffusers.WanVideoToVideoPipeline.from_pipe(pipe)
    assert usv.summary(sibling) == usv.summary(pipe) and "TileTopK" in usv.summary(sibling)
    usv.disable(sibling)
    assert "not enabled" in usv.summary(pipe) and torch.equal(tiny_pipelines.video(pipe, call), own)
    usv.enable(sibling, **ALL)
    usv.enable(pipe, **{**ALL, "density": 1.0})
    usv.disable(sibling)
    assert torch.equal(tiny_pipelines.video(usv.disable(pipe), call), own), "the one before it is no original"
    assert not hasattr(pipe, "_usv")


def test_a_refused_second_enable_leaves_the_first(three):
    pipe, call, _, sparse = three
    usv.enable(pipe, **ALL)
    for wrong, message in (({"impl": "cuda"}, "impl: got 'cuda', accepted: auto"), ({"density": 2.0}, "density: got 2.0"),
                           ({"recall_rows": -1}, "recall_rows: got -1")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            usv.enable(pipe, **{**ALL, **wrong})
    pipe.transformer._parallel_config = SimpleNamespace(context_parallel_config=object())
    with pytest.raises(ValueError, match="context parallelism"):
        usv.enable(pipe, **ALL)
    with pytest.raises(ValueError, match="context parallelism"):
        tiny_pipelines.video(pipe, call)
    pipe.transformer._parallel_config = None
    assert torch.equal(tiny_pipelines.video(pipe, call), sparse)


def test_processors_that_were_set_since_are_noticed_and_kept(three):
    pipe, call, *_ = three
    usv.enable(pipe, **ALL)
    own = pipe._usv.attached[0].originals[0]
    pipe.transformer.blocks[0].attn1.set_processor(own)
    with pytest.raises(ValueError, match="attention processors: got ones that were set after"):
        tiny_pipelines.video(pipe, call)
    usv.disable(pipe)
    assert pipe.transformer.blocks[0].attn1.processor is own


def offload(pipe, kind):
    here = torch.device("cpu")
    if kind == "model":
        pipe.enable_model_cpu_offload(device=here)
    elif kind == "cast":
        pipe.transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    else:
        pipe.transformer.enable_group_offload(here, offload_type=kind, num_blocks_per_group=1)


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("kind", ["model", "leaf_level", "block_level", "cast"])
def test_offloading_before_and_after(three, kind, first):
    pipe, call, own, sparse = three
    for step in ("offload", "enable") if first else ("enable", "offload"):
        offload(pipe, kind) if step == "offload" else usv.enable(pipe, **ALL)
    rounding = 0.05 if kind == "cast" else 0  # weights in bfloat16
    torch.testing.assert_close(tiny_pipelines.video(pipe, call), sparse, rtol=0, atol=rounding)
    assert len(pipe._usv.record.calls) == 8
    usv.disable(pipe)
    torch.testing.assert_close(tiny_pipelines.video(pipe, call), own, rtol=0, atol=rounding)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("WanPipeline", [(0, True), (1, False), (2, False), (3, False), (4, False)]),
        # strength 0.8: the schedule's first step, the warm-up, is not run
        ("WanVideoToVideoPipeline", [(1, False), (2, False), (3, False), (4, False)]),
        # its scheduler never steps, copies of it do: the timestep tells
        ("SkyReelsV2DiffusionForcingPipeline", [(0, True), (1, False), (2, False), (3, False), (4, False)]),
        # the transformer is told another unit of time than the schedule's
        ("Cosmos2VideoToWorldPipeline", [(0, True), (1, False), (2, False), (3, False), (4, False)]),
    ],
)
def test_the_warm_up_is_the_first_fifth_of_the_schedule(name, expected):
    pipe, call = tiny_pipelines.make(name)
    usv.enable(pipe, **PATTERN, dense_steps=0.2)
    tiny_pipelines.video(pipe, {**call, "num_inference_steps": 5})
    assert list(dict.fromkeys((call.step, call.dense) for call in pipe._usv.record.calls)) == expected


def test_a_record_does_not_grow_with_the_videos():
    record = PatternRecord()
    seconds = dict.fromkeys(("attention", "select"), 0.5)
    for i in range(2 * KEPT_CALLS):
        record.add(CallStats(0, i, 0.25 if i % 2 else 1.0, seconds, None if i % 4 else 0.5, dense=i % 2 == 0))
    assert len(record.calls) == KEPT_CALLS and record.calls[-1].step == 2 * KEPT_CALLS - 1
    assert record.mean_density() == 0.625 and record.sparse_density() == 0.25 and record.mean_recall() is None
    assert record.stage_seconds()["select"] == KEPT_CALLS / 2
    record.reset()
    assert record.mean_density() == 1.0 and not record.calls.totals


def test_a_pipeline_that_is_refused_says_why():
    pipe = SimpleNamespace(transformer=type("SanaVideoTransformer3DModel", (torch.nn.Module,), {})())
    with pytest.raises(ValueError, match="SanaVideoTransformer3DModel: linear attention makes no score matrix"):
        usv.enable(pipe, attention="svg")
    with pytest.raises(ValueError, match="UNetMotionModel|a UNet attends within a frame"):
        usv.enable(SimpleNamespace(unet=type("UNetMotionModel", (), {})()), attention="svg")
