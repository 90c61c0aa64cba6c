"""policy.mode=dynamic: the plan says how much on average, the input how much of it is its own."""

import json

import pytest
import tiny
import torch
from runs import interrupt, program, same

from usv.sampling.checkpoint import load_student
from usv.sampling.generate import load_pipeline
from usv.sparse.attention import kept_of_mass, sparse_attention
from usv.sparse.plan import Rung, SparsityPlan, executed_densities

STARTS, SIZES = torch.arange(0, 64, 8, dtype=torch.int32), torch.full((8,), 8, dtype=torch.int32)


def test_an_input_computes_what_holds_its_mass():
    """Attention that lies on one block computes one, attention spread evenly the whole share; both are what is listed."""
    torch.manual_seed(0)
    k, v = (torch.randn(1, 2, 64, 16) for _ in range(2))
    centre = k.unflatten(2, (8, 8)).mean(3)[:, :, 3:4]
    found = {}
    for name, scale in (("one", 80.0), ("spread", 0.0)):
        q = (scale * centre).expand(1, 2, 64, 16).contiguous()
        out, stats = sparse_attention(q, k, v, STARTS, SIZES, 4, mass=0.8)
        found[name] = float(stats.density)
        assert float(stats.coarse_recall) >= 0.8
        scores = (q.unflatten(2, (8, 8)).mean(3) @ k.unflatten(2, (8, 8)).mean(3).transpose(-1, -2) / 4).float()
        kept = kept_of_mass(scores, 0.8)
        assert kept.sum() == round(128 * found[name]) and kept.max() - kept.min() <= 1, "equal rows keep alike"
        rank = scores.sort(dim=-1, descending=True, stable=True).indices.argsort(-1)
        keep = rank < kept[..., None]
        mask = keep.repeat_interleave(8, 2).repeat_interleave(8, 3)
        assert torch.allclose(out, torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask), atol=1e-5)
    assert found == {"one": 1 / 8, "spread": 103 / 128}  # 0.8 of 128 equal blocks is the 103rd
    _, fixed = sparse_attention(q, k, v, STARTS, SIZES, 4)
    assert float(fixed.density) == 0.5


def test_no_choice_of_so_many_blocks_holds_more():
    """One threshold over all heads against a share kept in every row, at equal numbers of blocks: the former holds more, and the most."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 4, 6, 16, generator=generator) * torch.tensor([0.2, 1.0, 3.0, 8.0]).view(1, 4, 1, 1)  # diffuse and concentrated heads
    share = scores.softmax(-1).sort(-1, descending=True).values
    held = lambda kept: (share * (torch.arange(16) < kept[..., None])).flatten(1).sum(-1) / 24  # noqa: E731
    for p in (0.5, 0.8, 0.95):
        own = (share.cumsum(-1) - share < p).sum(-1)  # top-p of every row
        mass = held(own)
        for b in range(2):
            kept = kept_of_mass(scores[b : b + 1], float(mass[b]))
            assert kept.sum() < own[b].sum(), "the same mass in fewer blocks"
            best = share[b].flatten().sort(descending=True).values[: int(kept.sum())].sum() / 24
            assert mass[b] - 1e-5 <= held(kept.expand(2, -1, -1))[b] <= best + 1e-5


def test_a_mass_travels_with_the_plan_and_is_no_decision():
    plan = SparsityPlan((500.0, 1000.0), ((Rung(2, 1), Rung()), (Rung(3, 0), Rung(1, 0))))
    steered = plan.steered(1, {0: 0.625})
    assert steered.rungs[1][0].mass == 0.625 and steered.rungs[1][1].mass == 0 and steered.rungs[1][0] == Rung(3, 0)
    again = SparsityPlan.from_dict(json.loads(json.dumps(steered.to_dict())))
    assert [[r.mass for r in row] for row in again.rungs] == [[0, 0], [0.625, 0]] and again == steered
    assert plan.to_dict()["rungs"] == [[[2, 1], [0, 0]], [[3, 0], [1, 0]]], "what was written before reads as it did"
    assert steered.only(["merge"]).rungs[1][0].mass == 0 and steered.only(["density"]).rungs[1][0].mass == 0.625
    with pytest.raises(ValueError, match="mass"):
        SparsityPlan.from_dict({"edges": [1000.0], "rungs": [[[2, 0, 1.5]]]})


def dynamic(config):
    """Of a fixed plan from the second step on."""
    config.policy.mode, config.policy.budget, config.policy.warm_down, config.policy.freeze_at = "dynamic", 0.8, [0.0, 0.02], 0.05
    config.policy.axes = ["density"]
    return config


def test_densities_are_met_on_average_and_differ_by_input(make, watched, tmp_path, tiny_wan, monkeypatch):
    config, seen, original = dynamic(make(tmp_path / "run", policy="static", steps=60)), {}, program.Run.steer

    def spy(run, decisions, stats):
        for layer in stats:
            seen.setdefault((decisions.bin, layer), []).append((decisions.rungs[layer].mass, float(stats[layer].density)))
        original(run, decisions, stats)

    monkeypatch.setattr(program.Run, "steer", spy)
    config.optim.lr, config.logger.validate_every = 0.0, 60
    watched(config)
    student, wanted = load_student(tmp_path / "run" / "student", load_pipeline(str(tiny_wan)).transformer), executed_densities(8)
    for (bin, layer), visits in seen.items():
        rung = student.plan.rungs[bin][layer]
        assert visits[0] == (0.0, wanted[rung.density]), "the first visit is the plan's own"
        assert all(mass > 0 for mass, _ in visits[1:]) and rung.mass > 0
        executed = [density for _, density in visits[len(visits) // 2 :]]
        assert abs(sum(executed) / len(executed) - wanted[rung.density]) < 0.06
    text, found = torch.zeros(1, tiny.TEXT, 64), []
    for scale in (0.1, 8.0):
        latents = scale * torch.randn(1, 16, 5, 8, 8, generator=torch.Generator().manual_seed(0))
        _, stats = student.model(latents, torch.tensor([700.0]), text, student.plan.at(700.0))
        found.append(tuple(float(s.density) for s in stats.values()))
    assert found[0] != found[1]


@pytest.mark.parametrize("stop", [3, 9])
def test_resume_goes_on_steering(make, watched, tmp_path, stop):
    def run(name):
        return dynamic(make(tmp_path / name, steps=12))

    _, whole, a = watched(run("whole"))
    watched(run("parts"), at={stop: interrupt})
    _, parts, b = watched(run("parts"))
    assert same(whole, parts) and a["plan"] == b["plan"] and any(len(rung) == 3 for row in a["plan"]["rungs"] for rung in row)
