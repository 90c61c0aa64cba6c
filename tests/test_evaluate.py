"""What students are asked in an evaluation."""

from usv.evaluate import camera_motion, requests


def test_every_subject_with_every_motion():
    """120 captions, no two alike; twice as many ask each twice; a few still ask for all subjects and all motions."""
    world = camera_motion()
    prompts, subjects, motions = requests(120)
    assert len({*prompts}) == len({*zip(subjects, motions)}) == len(world.SUBJECTS) * len(world.MOTIONS) == 120
    assert prompts == [world.caption(s, m) for s, m in zip(subjects, motions)]
    assert sorted(requests(240)[0]) == sorted(prompts * 2)
    few = requests(16)
    assert {*few[1]} == set(range(15)) and {*few[2]} == set(range(8))
