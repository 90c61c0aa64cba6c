"""optim.train=router: gates and policy learn on a base that stays as it is, for every copy of that base."""

import sys
from pathlib import Path

import pytest
import runs
import tiny
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train
import usv
from usv.config import SettingError, check_train
from usv.sampling.checkpoint import CheckpointError, load_student, read_config, save_student
from usv.sampling.generate import load_pipeline
from usv.sparse.plan import Rung, SparsityPlan


def settings(tiny_wan, tiny_shards, out):
    config = runs.settings(tiny_wan, tiny_shards, out, steps=6)
    config.optim.train, config.optim.lr = "router", 0.05
    config.model.guidance_scale, config.logger.videos = 3.0, False
    return config


@pytest.fixture(scope="module")
def trained(tiny_wan, tiny_shards, tmp_path_factory):
    return train.train(settings(tiny_wan, tiny_shards, tmp_path_factory.mktemp("router") / "run"))


def ask(pipe, **more):
    kwargs = {"height": tiny.SIZE, "width": tiny.SIZE, "num_frames": tiny.FRAMES - 1, "num_inference_steps": 2, "max_sequence_length": tiny.TEXT}
    return pipe("a cat", generator=torch.Generator().manual_seed(0), output_type="latent", **kwargs | more).frames


def test_the_file_holds_gates_that_learned_and_nothing_else(trained):
    gates = load_file(trained / "student.safetensors")
    assert gates and all(name.startswith("gates.") for name in gates) and any(bool(value.any()) for value in gates.values())
    record = read_config(trained)
    assert set(record["base"]) == {f"blocks.{i}.{layer}.weight" for i in (0, 1) for layer in ("attn1.to_q", "ffn.net.2")}
    assert record["router"] and record["sampling"]["guidance_scale"] == 3.0 and "guidance_folded_in" not in record["sampling"]


def test_a_plan_that_begins_dense_has_nothing_to_learn_yet(tiny_wan, tiny_shards, tmp_path):
    config = settings(tiny_wan, tiny_shards, tmp_path / "run")
    config.policy.name, config.policy.warm_down = "static", [0.4, 0.5]
    assert any(bool(value.any()) for value in load_file(train.train(config) / "student.safetensors").values())


def test_the_base_is_as_it_was_and_guidance_stays_outside(trained, tiny_wan):
    pipe = load_pipeline(str(tiny_wan))
    before = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    student = load_student(trained, pipe.transformer)
    own = student.model.transformer.state_dict()
    assert all(torch.equal(own[name], value) for name, value in before.items())
    dense = ask(pipe, guidance_scale=3.0)
    student.plan = SparsityPlan(student.plan.edges, tuple(tuple(Rung() for _ in row) for row in student.plan.rungs))
    usv.enable(pipe, student)
    assert torch.allclose(ask(pipe, num_frames=tiny.FRAMES), dense, rtol=0, atol=1e-5), "every block kept: the base at the guidance of the checkpoint"
    assert pipe._usv.record.forwards == 4, "two forwards a step"
    assert not torch.allclose(ask(pipe, num_frames=tiny.FRAMES, guidance_scale=1.0), dense, atol=1e-3)
    usv.disable(pipe)
    assert torch.equal(ask(pipe, guidance_scale=3.0), dense)
    usv.enable(pipe, trained)
    assert not torch.equal(ask(pipe, num_frames=tiny.FRAMES), dense) and pipe._usv.record.mean_density() < 1
    usv.disable(pipe)


def test_a_base_with_other_weights_takes_it_and_runs_its_own(trained, tiny_wan):
    """A fine-tuned or quantised copy: the tensors are the copy's, the very ones where its weights are of another kind."""
    pipe = load_pipeline(str(tiny_wan))
    with torch.no_grad():
        for p in pipe.transformer.parameters():
            p.mul_(1.01)
    plain = load_student(trained, pipe.transformer)
    pipe.transformer.hf_quantizer = object()
    pipe.transformer.register_to_config(quantization_config=None)
    shared = load_student(trained, pipe.transformer)
    theirs = dict(pipe.transformer.named_parameters())
    assert all(p is theirs[name] for name, p in shared.model.transformer.named_parameters())
    usv.enable(pipe, shared)
    first = ask(pipe, num_frames=tiny.FRAMES)
    usv.enable(pipe, plain)
    assert torch.equal(first, ask(pipe, num_frames=tiny.FRAMES))
    usv.disable(pipe)


def test_what_does_not_go_together_is_refused(trained, tiny_wan, tiny_shards, tmp_path):
    config = settings(tiny_wan, tiny_shards, tmp_path / "run")
    config.lora.rank = 4
    with pytest.raises(SettingError, match="lora.rank: got 4 with optim.train=router, accepted: 0"):
        check_train(config)
    config = settings(tiny_wan, tiny_shards, tmp_path / "run")
    config.objective.name = "consistency"
    with pytest.raises(SettingError, match="objective: got consistency with optim.train=router, accepted: velocity"):
        check_train(config)
    pipe = load_pipeline(str(tiny_wan))
    whole = load_student(trained, pipe.transformer)
    whole.router = False
    save_student(tmp_path / "whole", whole)
    pipe.transformer.hf_quantizer = object()
    with pytest.raises(CheckpointError, match="weights of its own for a base quantised by .*, accepted: one of a router"):
        load_student(tmp_path / "whole", pipe.transformer)
    config = settings(tiny_wan, tiny_shards, tmp_path / "other")
    config.objective.init = str(tmp_path / "whole")
    with pytest.raises(SettingError, match="objective.init: got .*whole, whose weights a router does not take"):
        train.train(config)


def test_a_base_with_fused_projections_takes_it(trained, tiny_wan):
    plain, fused = load_pipeline(str(tiny_wan)), load_pipeline(str(tiny_wan))
    fused.transformer.fuse_qkv_projections()
    wanted, found = (ask(usv.enable(pipe, trained), num_frames=tiny.FRAMES) for pipe in (plain, fused))
    assert torch.allclose(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
