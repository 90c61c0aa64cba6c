"""optim.accumulate: a step's clips one after another give what they give at once."""

import pytest
import torch

from usv.config import SettingError


@pytest.mark.parametrize("policy, objective", [("gumbel", "velocity"), ("static", "consistency"), ("entropy", "velocity"), ("gumbel", "distribution")])
def test_four_parts_of_one_equal_one_of_four(make, watched, tmp_path, policy, objective):
    """Losses, gradient norms, weights and the decided plan to rounding: 1e-5 of each."""
    runs = []
    for parts in (1, 4):
        config = make(tmp_path / str(parts), policy, steps=4)
        config.optim.batch_size, config.optim.accumulate, config.logger.videos = 4, parts, False
        config.objective.name, config.objective.student_timesteps = objective, [] if objective == "velocity" else [1000.0, 500.0]
        if objective == "distribution":  # the critic's steps too, and the head's, and those before the student's first
            d = config.objective
            d.matching_weight, d.critic_updates, d.critic_warmup, d.adversarial_weight, d.critic_lr = 0.5, 2, 1, 0.1, 1e-4
        runs.append(watched(config))
    (whole, weights, record), (parted, same, other) = runs
    for step, (loss, norm) in whole.items():
        assert parted[step] == (pytest.approx(loss, rel=1e-5), pytest.approx(norm, rel=1e-5)), step
    # AdamW's first steps divide a gradient by its own size, so the last bits of one near zero show: a twentieth of lr · steps
    assert max(float((weights[name] - same[name]).abs().max()) for name in weights) < 1e-3 * 4 / 20
    close = sum(torch.isclose(weights[name], same[name], rtol=1e-5, atol=1e-7).sum().item() for name in weights) / sum(w.numel() for w in weights.values())
    assert close > 0.99 and record["plan"] == other["plan"]


def test_parts_that_do_not_fit_are_refused(make, watched, tmp_path):
    config = make(tmp_path / "run", "static", steps=1)
    config.optim.accumulate = 3
    with pytest.raises(SettingError, match="optim.batch_size: got 2, accepted: multiples of the 1 processes × optim.accumulate=3"):
        watched(config)
