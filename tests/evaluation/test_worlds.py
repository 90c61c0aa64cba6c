"""Each world asks, makes and tells the same labels; and what learnt to recognise MovingThings' is held to clips it never saw."""

import json
from dataclasses import replace

import pytest
import torch

from usv.config import ModelConfig, SettingError
from usv.evaluation.clips import FLOOR_SEED, asked_clips, real_clips, requests
from usv.evaluation.worlds import MovingThings, world_of
from usv.metrics.motion import camera_motion
from usv.metrics.recogniser import Recogniser, load_recogniser, motions
from usv.metrics.summary import measure_videos


@pytest.fixture
def things(tmp_path):
    (tmp_path / "usv.json").write_text(json.dumps({"world": "moving_things"}))
    return ModelConfig(path=str(tmp_path), height=48, width=48)


def test_a_folder_says_its_world(things, tmp_path):
    assert isinstance(world_of(things), MovingThings) and type(world_of(ModelConfig())).__name__ == "CameraMotion"
    (tmp_path / "usv.json").write_text('{"world": "elsewhere"}')
    with pytest.raises(SettingError, match="got world 'elsewhere', accepted: camera_motion | moving_things"):
        world_of(things)


def test_moving_things_are_asked_in_turn_and_some_were_held_out(things):
    script, asked = world_of(things).script, requests(things, 120)
    assert asked.subjects == [i % 12 for i in range(120)] and len({*asked.prompts}) > 110
    assert all(script.labels_of(prompt) == labels for prompt, labels in zip(asked.prompts, asked.labels))
    assert [labels[2:] for labels in asked.labels] == asked.motions
    held = sum(script.held_out(s, m, c) for s, _, m, c in asked.labels)
    assert 5 < held < 30
    assert requests(things, 24).prompts == asked.prompts[:24]


def test_real_clips_are_of_the_labels_and_their_mean_of_many(things):
    labels = [(0, 0, 1, 0), (3, 1, 0, 3)]
    clips = asked_clips(things, labels, FLOOR_SEED)
    assert clips.shape == (2, 9, 3, 48, 48) and torch.equal(clips, asked_clips(things, labels, FLOOR_SEED)) and clips.min() >= 0 and clips.max() <= 1
    few = asked_clips(things, labels, FLOOR_SEED, 3)
    assert few.diff(dim=-1).abs().mean() < clips.diff(dim=-1).abs().mean()
    frames, subjects = real_clips(things, 3)
    assert frames.shape == (3, 9, 3, 48, 48) and all(0 <= s < 12 for s in subjects)


def test_a_recogniser_is_what_was_saved_and_takes_any_size(tmp_path):
    torch.manual_seed(0)
    network = Recogniser(12, depth=1).eval()
    network.save(tmp_path / "r.safetensors", {"steps": 0})
    again, videos = load_recogniser(tmp_path / "r.safetensors"), torch.rand(3, 5, 3, 96, 64)
    logits, where = again(videos)
    assert logits.shape == (3, 12) and where.shape == (3, 5, 12, 12) and torch.allclose(network(videos)[0], logits, atol=2e-3)
    subjects, paths = again.recognise(videos)
    assert subjects == logits.argmax(1).tolist() and paths.shape == (3, 5, 2)
    with pytest.raises(ValueError, match="expected finite values in"):
        again.recognise(videos * 300)


def test_motion_is_the_things_own_beside_the_cameras(things):
    """Pairs of motions, from the true cover and the flow: a thing that stands under a camera that pans is seen to travel."""
    script, network = world_of(things).script, Recogniser(12)
    pairs = [(0, 0), (0, 1), (0, 3), (1, 0), (1, 2), (2, 2), (3, 4), (4, 1), (4, 3), (3, 0)]
    clips = [script.make_clip(3, 0, *pair, torch.Generator().manual_seed(i), layout=12) for i, pair in enumerate(pairs)]
    cover = torch.stack([clip.layout[..., 0] for clip in clips])
    network.forward = lambda videos: (torch.zeros(len(videos), 12), cover[: len(videos)].mul(8).sub(4))
    frames = torch.stack([clip.frames for clip in clips]).float() / 255
    _, paths = network.recognise(frames, batch_size=len(frames))
    found = motions(paths, camera_motion(frames))
    assert found == pairs


def test_labels_by_recogniser_are_hits_of_both_motions(monkeypatch):
    monkeypatch.setattr("usv.metrics.summary.told", lambda *a: ([0, 1, 2], [(0, 3), (1, 4), (2, None)]))
    each, _ = measure_videos(torch.rand(3, 9, 3, 48, 48), [0, 1, 3], [(0, 3), (1, 0), (2, 0)], prototypes=Recogniser(12))
    assert each["subject_accuracy"].tolist() == [1, 1, 0] and each["motion_accuracy"].tolist() == [1, 0, 0]


def test_what_ships_tells_clips_it_never_saw(things):
    """At twice the size it was trained at, held-out triples among them."""
    model = replace(things, height=96, width=96)
    asked = requests(model, 24)
    each, _ = measure_videos(asked_clips(model, asked.labels, FLOOR_SEED), asked.subjects, asked.motions, prototypes=world_of(model).teller(None, []))
    assert each["subject_accuracy"].mean() > 0.95 and each["motion_accuracy"].mean() > 0.9
