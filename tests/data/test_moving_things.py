"""MovingThings: captions and labels say each other, motion is what the caption says, and the mean of a caption's clips is a blur."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "data"))

import build_moving_things as build  # noqa: E402
import moving_things as world  # noqa: E402


def clip(subject=1, place=0, motion=0, camera=0, seed=0, **more):
    return world.make_clip(subject, place, motion, camera, torch.Generator().manual_seed(seed), 9, 48, **more)


def test_captions_and_labels():
    for i in range(60):
        drawn = world.labels(torch.Generator().manual_seed(i), hold_out=False)
        assert world.labels_of(world.caption(*drawn)) == drawn
    with pytest.raises(ValueError, match="none of MovingThings; accepted"):
        world.labels_of("a cat, the camera pans left")


def test_other_wordings_name_the_same_things():
    said = {world.caption(0, 0, 1, 1, torch.Generator().manual_seed(i)) for i in range(40)}
    assert len(said) > 8 and all(world.THINGS[0] in text and list(world.PLACES)[0] in text and "left" in text for text in said)


def test_training_never_sees_a_held_out_triple():
    """One in eight is held out; every thing, motion and camera has both kinds."""
    triples = [(s, m, c) for s in range(12) for m in range(5) for c in range(5)]
    out = [t for t in triples if world.held_out(*t)]
    assert len(out) == pytest.approx(len(triples) / 8, abs=2)
    for axis, count in enumerate((12, 5, 5)):
        assert all(0 < sum(t[axis] == k for t in out) < len(triples) / count for k in range(count))
    drawn = [world.labels(torch.Generator().manual_seed(i)) for i in range(300)]
    assert not any(world.held_out(s, m, c) for s, _, m, c in drawn)
    easy = sum(m == 0 or c == 0 for _, _, m, c in drawn) / len(drawn)
    assert 0.55 < easy < 0.8  # half by choice, and of the rest nine in twenty-five by chance


def test_a_clip_is_its_index_and_stream():
    a, b = world.sample_clip(3, 1, size=48), world.sample_clip(3, 1, size=48)
    assert torch.equal(a.frames, b.frames) and a.caption == b.caption
    assert not torch.equal(a.frames, world.sample_clip(3, 2, size=48).frames)
    assert a.frames.shape == (9, 3, 48, 48) and a.frames.dtype == torch.uint8


def centre(layout):
    """(T, 2) of the thing's cover, in half views."""
    cover = layout[..., 0]
    axis = (torch.arange(cover.shape[1]) + 0.5) / cover.shape[1] * 2 - 1
    total = cover.sum((1, 2)).clamp_min(1e-6)
    return torch.stack([(cover.sum(1) * axis).sum(1) / total, (cover.sum(2) * axis).sum(1) / total], 1)


@pytest.mark.parametrize(
    "motion, camera, sign", [("moves left", "is still", (-1, 0)), ("moves right", "is still", (1, 0)), ("rises", "is still", (0, -1)), ("falls", "is still", (0, 1)), ("stands still", "pans left", (1, 0)), ("stands still", "pans right", (-1, 0))]
)  # fmt: skip
def test_the_thing_goes_where_the_caption_says(motion, camera, sign):
    """In the frame: its own motion, or against a camera that pans."""
    labels = list(world.MOTIONS).index(motion), list(world.CAMERAS).index(camera)
    for seed in range(4):
        path = centre(clip(motion=labels[0], camera=labels[1], seed=seed, layout=24).layout)
        travel = path[-1] - path[0]
        for moved, wanted in zip(travel.tolist(), sign):
            assert moved * wanted > 0.4 if wanted else abs(moved) < 0.12, (motion, camera, seed, travel)


def test_a_zoom_makes_the_thing_grow_and_a_still_clip_stands():
    cover = clip(camera=3, seed=1, layout=24).layout[..., 0].sum((1, 2))
    assert cover[-1] > 1.3 * cover[0]
    still = clip(seed=1)
    assert (still.frames[0] == still.frames[-1]).all()


def test_the_mean_of_a_caption_is_a_blur():
    """What one forward from pure noise can at best give has less than half of a clip's contrast between neighbours."""
    clips = torch.stack([clip(motion=1, camera=2, seed=i).frames[4].float() for i in range(24)])
    detail = lambda x: x.diff(dim=-1).abs().mean()  # noqa: E731
    assert detail(clips.mean(0)) < 0.5 * detail(clips)


def test_training_goes_on_from_what_was_kept(tmp_path):
    """The average of all modules in fp16, where it stood, and a learning rate that warms up again."""
    def training(value):
        made = build.Training.__new__(build.Training)
        made.kept = tmp_path / "training.safetensors"
        made.modules = {"model": torch.nn.Linear(3, 2), "places": torch.nn.Linear(2, 1)}
        made.params = [p for m in made.modules.values() for p in m.parameters()]
        made.ema, made.state = [torch.full_like(p, value) for p in made.params], {"stage": 0, "step": 70, "clips": 2240}
        return made

    training(0.5).keep()
    other = training(0.0)
    other.restore()
    assert all((p == 0.5).all() and (e == 0.5).all() for p, e in zip(other.params, other.ema))
    assert other.state == {"stage": 0, "step": 70, "clips": 2240, "warm": 70}


@pytest.mark.parametrize("motion, camera", [(1, 2), (3, 4), (0, 3)])
def test_five_frames_are_every_other_of_nine(motion, camera):
    """What training on fewer frames sees is the same clip, at the same places, with the same layout."""
    make = lambda frames: world.make_clip(2, 1, motion, camera, torch.Generator().manual_seed(5), frames, 48, layout=6)  # noqa: E731
    few, all_ = make(5), make(9)
    assert torch.equal(few.frames, all_.frames[::2])
    assert torch.allclose(few.layout, all_.layout[::2], atol=1e-4)


def test_a_token_of_every_other_frame_stands_where_it_does_among_all():
    """RoPE and the read-out's targets are those of the frame's own number."""
    mini = build.mini
    model = build.parts.make_transformer()
    mini.strided_rope(model, 2)
    whole = model.rope.freqs_cos.clone()
    mini.strided_rope(model, 2, 2)
    t = model.rope.t_dim
    assert torch.equal(model.rope.freqs_cos[:5, :t], whole[:9:2, :t]) and torch.equal(model.rope.freqs_cos[:, t:], whole[:, t:])
    places = mini.Places(model)
    torch.nn.init.zeros_(places.read.weight), torch.nn.init.zeros_(places.read.bias)
    places.hidden = torch.randn(1, 9 * 4, 128)
    nine = float(places.loss((9, 2, 2)).detach())
    places.hidden = torch.randn(1, 5 * 4, 128)
    order, i = torch.arange(1, places.K + 1), torch.arange(9)[::2, None]
    of_time = (2 * torch.cos(torch.pi * order * (i + 0.5) / 9).square()).mean()
    rest = 3 * nine - float((2 * torch.cos(torch.pi * order * (torch.arange(9)[:, None] + 0.5) / 9).square()).mean())
    assert float(places.loss((5, 2, 2), 2).detach()) == pytest.approx((float(of_time) + rest) / 3, abs=1e-5)


def test_things_stand_on_a_grid_and_move_by_whole_patches():
    """At 96 px a thing's picture in one frame is that of the frame before, 4 px on; two sizes, several places."""
    for motion, camera in ((2, 0), (4, 1), (0, 2)):
        places = set()
        for seed in range(12):
            cover = world.make_clip(8, 3, motion, camera, torch.Generator().manual_seed(seed), 9, 96, layout=96).layout[..., 0]
            first, last = cover[3], cover[5]
            (dx, dy) = {(2, 0): (8, 0), (4, 1): (8, 8), (0, 2): (-8, 0)}[(motion, camera)]
            assert torch.allclose(last, first.roll((dy, dx), (0, 1)), atol=2e-3), (motion, camera, seed)
            places.add((round(float(centre(cover[4:5, ..., None])[0, 0]), 2), round(float(cover[4].sum()), 0)))
        assert len(places) > 5
