"""Each world asks, makes and tells the same labels; and what learnt to recognise MovingThings' is held to clips it never saw."""

import json

import pytest
import torch

from usv.config import ModelConfig, SettingError
from usv.evaluation.clips import FLOOR_SEED, asked_clips, real_clips, requests
from usv.evaluation.worlds import MovingThings, world_of
from usv.metrics.recogniser import Recogniser, load_recogniser
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
    network = Recogniser({"subject": 12, "motion": 5, "camera": 5}, depth=1).eval()
    network.save(tmp_path / "r.safetensors", {"steps": 0})
    again, videos = load_recogniser(tmp_path / "r.safetensors"), torch.rand(3, 5, 3, 96, 64)
    logits, where = again(videos)
    assert {name: tuple(x.shape) for name, x in logits.items()} == {"subject": (3, 12), "motion": (3, 5), "camera": (3, 5)} and where.shape == (3, 5, 12, 12)
    for name, value in network(videos)[0].items():
        assert torch.allclose(value, logits[name], atol=2e-3)
    assert again.recognise(videos) == {name: x.argmax(1).tolist() for name, x in logits.items()}
    with pytest.raises(ValueError, match="expected finite values in"):
        again.recognise(videos * 300)


def test_labels_by_recogniser_are_hits_of_both_motions(things):
    class Sees(Recogniser):
        def recognise(self, videos, batch_size=16):
            return {"subject": [0, 1, 2], "motion": [0, 1, 2], "camera": [3, 4, 0]}

    videos = torch.rand(3, 9, 3, 48, 48)
    each, _ = measure_videos(videos, [0, 1, 3], [(0, 3), (1, 0), (0, 0)], prototypes=Sees({"subject": 12, "motion": 5, "camera": 5}))
    assert each["subject_accuracy"].tolist() == [1, 1, 0] and each["motion_accuracy"].tolist() == [1, 0, 0]
