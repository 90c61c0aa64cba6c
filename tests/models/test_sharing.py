"""Every family that two processes can share samples of gives one process's outputs and gradients, of every parameter; the others say so.

Weights and inputs are fp64, but diffusers forms RoPE and some norms in fp32 (6e-8 a rounding): 1e-5 of a parameter's largest gradient,
and 1e-8 of the largest of all where its own is rounding alone (a key's bias in softmax).
"""

import copy

import pytest
import torch
import torch.distributed as dist
from family_cases import (
    cogvideox,
    cogvideox_rope,
    hunyuan_video,
    hunyuan_video15_i2v,
    hunyuan_video_replace,
    ltx2,
    ltx_i2v,
    mochi,
    wan_animate,
    wan_vace,
)
from processes import mean, two

from usv.config import RuntimeConfig, SettingError, TrainConfig
from usv.models.forward import Probe, SparseTransformer
from usv.sparse.grid import Tile
from usv.sparse.plan import Rung
from usv.sparse.sequence_parallel import SequenceGroup
from usv.training.feasible import check_sharing

# text before and after, padded and whole, from stream to stream; two lists of blocks; modules between blocks; a row a token
CASES = {case.__name__: case for case in (cogvideox, cogvideox_rope, hunyuan_video, hunyuan_video_replace, hunyuan_video15_i2v, ltx_i2v, mochi, wan_animate, wan_vace)}
SETTINGS = {"dense": (Rung(), None), "merged": (Rung(1, 1), Rung(2, 0))}  # of every layer; a probe of layer 1, with checkpointing


def double(value):
    if isinstance(value, tuple):
        return tuple(map(double, value))
    return value.double() if torch.is_tensor(value) and value.is_floating_point() else value


def built(case):
    torch.manual_seed(0)
    transformer, arguments = case()
    model = SparseTransformer(transformer, Tile(2, 2, 2)).double().train()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model, {name: double(value) for name, value in arguments.items()}


def found(model, arguments, setting) -> dict[str, torch.Tensor]:
    """Output and gradients, zeros where there is none."""
    rung, other = SETTINGS[setting]
    mix = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    model.transformer.gradient_checkpointing = False
    if other is not None:
        model.transformer.enable_gradient_checkpointing()
    probes = {} if other is None else {1: Probe(other, mix)}
    out, _ = model.run(copy.deepcopy(arguments), [rung] * model.num_layers, probes, "reference")
    leaves = {**dict(model.named_parameters()), "mix": mix}
    gradients = torch.autograd.grad(out.square().mean(), list(leaves.values()), allow_unused=True)
    return {"output": out.detach()} | {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(leaves.items(), gradients)}


def work(rank: int, file: str) -> None:
    results = {}
    for name, case in CASES.items():
        model, arguments = built(case)
        model.sequence_group = SequenceGroup(rank, 2, dist.group.WORLD)
        results[name] = {setting: mean(found(model, arguments, setting)) for setting in SETTINGS}
    if rank == 0:
        torch.save(results, file)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    file = tmp_path_factory.mktemp("sharing") / "results.pt"
    two(work, str(file))
    return torch.load(file)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(shared, name):
    model, arguments = built(CASES[name])
    for setting in SETTINGS:
        wanted = found(model, arguments, setting)
        largest = max(float(value.abs().max()) for key, value in wanted.items() if key != "output")
        for key, value in wanted.items():
            worst = float((shared[name][setting][key] - value).abs().max())
            assert worst <= max(1e-5 * float(value.abs().max()), 1e-8 * largest), f"{setting}, {key}: {worst} of {float(value.abs().max())}"


def test_who_cannot_share_says_so():
    model, arguments = built(ltx2)
    model.sequence_group = SequenceGroup(0, 2)
    with pytest.raises(ValueError, match="sequence_group: got one for a ltx2, accepted: None"):
        model.run(arguments)
    with pytest.raises(SettingError, match="runtime.sequence_parallel: got 2 for a model of ltx2, accepted: 1"):
        check_sharing(TrainConfig(runtime=RuntimeConfig("ddp", sequence_parallel=2)), model.family)
