"""Paired intervals, the one definition of equal quality, coverage, the codec's grid."""

import math

import pytest
import torch

from usv.evaluation.calibrate import CLAIMS, accepted, damaged, judged
from usv.metrics import border_ratio, coverage, gap_closed, non_inferior, paired_difference, paired_frechet
from usv.metrics.paired import ACCURACY_MARGIN


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_pairs_see_what_samples_do_not():
    """A constant small gain under a large spread between clips: the paired interval is the gain itself."""
    a = normal(60) * 10
    found = paired_difference(a, a + 0.01)
    assert found.value == pytest.approx(0.01, abs=1e-6) and found.low == pytest.approx(0.01, abs=1e-6) and found.high == pytest.approx(0.01, abs=1e-6)


def test_clusters_widen_the_interval():
    """Twelve clips of each of five subjects that move together are five clips: the interval is that of their five means."""
    gains = torch.tensor([-0.2, -0.1, 0.0, 0.1, 0.3])
    subjects = [s for s in range(5) for _ in range(12)]
    b = gains[subjects]
    clustered, alone = paired_difference(torch.zeros(60), b, subjects), paired_difference(torch.zeros(60), b)
    five = paired_difference(torch.zeros(5), gains)
    assert (clustered.low, clustered.high) == pytest.approx((five.low, five.high))
    assert clustered.high - clustered.low > 2.5 * (alone.high - alone.low)  # √12 = 3.5 for a normal mean


def test_interval_covers():
    """Of 100 draws of 40 pairs with a true gain of 0.1 the 95% interval has it in 88 or more (binomial: fewer once in a thousand)."""
    hits = 0
    for i in range(100):
        a = normal(40, seed=2 * i)
        found = paired_difference(a, a + 0.1 + 0.5 * normal(40, seed=2 * i + 1), num_resamples=300, seed=i)
        hits += found.low <= 0.1 <= found.high
    assert hits >= 86  # the percentile bootstrap of 40 is a little short of 95%


@pytest.mark.parametrize(
    "a, b, clusters, said",
    [
        (torch.zeros(3), torch.zeros(4), None, "expected one for each"),
        (torch.zeros(3), torch.tensor([0.0, math.nan, 0.0]), None, "NaN"),
        (torch.zeros(3), torch.zeros(3), [1, 1, 1], "at least 2"),
        (torch.zeros(3), torch.zeros(3), [1, 2], "expected one per video"),
    ],
)
def test_bad_pairs(a, b, clusters, said):
    with pytest.raises(ValueError, match=said):
        paired_difference(a, b, clusters)


def methods(loss: int, blur: float):
    """120 clips of 12 subjects; the candidate misses `loss` of them and its features lie `blur` further off."""
    subjects = [i % 12 for i in range(120)]
    ones = torch.ones(120, dtype=torch.float64)
    worse = ones.clone()
    worse[:loss] = 0
    real, reference = normal(200, 16, seed=1), normal(120, 16, seed=2) + 0.5
    return {"subject_accuracy": ones, "motion_accuracy": ones}, {"subject_accuracy": worse, "motion_accuracy": ones}, subjects, (real, reference, reference + blur)


def test_equal_quality():
    """The same clips are of equal quality; a lost tenth, or features further off, are not; the verdict says which."""
    assert non_inferior(*methods(0, 0.0)).non_inferior
    lost = non_inferior(*methods(12, 0.0))
    assert not lost.non_inferior and [name for name, (_, within) in lost.metrics.items() if not within] == ["subject_accuracy"]
    assert lost.metrics["subject_accuracy"][0].value == pytest.approx(-0.1)
    far = non_inferior(*methods(0, 0.3))
    assert [name for name, (_, within) in far.metrics.items() if not within] == ["frechet_ratio"]


def test_not_shown_to_be_worse_is_not_equal():
    """Two lost clips of 120 are −0.017, within the margin of 0.02; with its uncertainty they are not."""
    verdict = non_inferior(*methods(2, 0.0))
    difference = verdict.metrics["subject_accuracy"][0]
    assert difference.value > -ACCURACY_MARGIN > difference.low and not verdict.non_inferior


def test_ratio_of_frechet_distances():
    _, _, subjects, (real, reference, _) = methods(0, 0.0)
    assert paired_frechet(real, reference, reference, subjects) == (1.0, 1.0, 1.0)
    ratio = paired_frechet(real, reference, reference + 0.5, subjects)
    assert 1 < ratio.low < ratio.value < ratio.high
    with pytest.raises(ValueError, match="candidate"):
        paired_frechet(real, reference, reference[:, :8])


def test_clips_of_one_prompt_are_one_cluster_of_the_ratio():
    """An effect that a prompt's clips share is as uncertain as there are prompts."""
    generator = torch.Generator().manual_seed(0)
    prompts = [i // 8 for i in range(128)]
    real, a, noise = (torch.randn(128, 4, generator=generator) for _ in range(3))
    b = a + 0.1 * noise + 1.5 * torch.randn(16, 4, generator=generator).repeat_interleave(8, 0)
    width = lambda d: d.high - d.low  # noqa: E731
    apart, whole = paired_frechet(real, a + 0.5, b + 0.5), paired_frechet(real, a + 0.5, b + 0.5, clusters=prompts)
    assert whole.value == apart.value and width(whole) > 1.5 * width(apart)
    assert paired_frechet(real, a, b, clusters=list(range(128))) == paired_frechet(real, a, b), "each clip its own"
    with pytest.raises(ValueError, match="clusters: got some beside strata"):
        paired_frechet(real, a, b, strata=prompts, clusters=prompts)
    with pytest.raises(ValueError, match="one cluster has no spread"):
        paired_frechet(real, a, b, clusters=[0] * 128)


def test_gap_closed():
    assert gap_closed(0.9, 0.7, 0.95) == pytest.approx(0.8) and gap_closed(600, 1800, 200) == pytest.approx(0.75)
    assert math.isnan(gap_closed(0.9, 0.9, 0.9))


def test_coverage():
    """The same distribution is covered as real clips cover one another; one of its two modes is half of it; far away is nothing."""
    modes = normal(200, 8, seed=3) + 20 * (torch.arange(200) % 2)[:, None]
    again = normal(200, 8, seed=4) + 20 * (torch.arange(200) % 2)[:, None]
    assert coverage(modes, again) > 0.9
    assert coverage(modes, again[::2]) == pytest.approx(0.5, abs=0.05)
    assert coverage(modes, again + 100) == 0
    with pytest.raises(ValueError, match="neighbours"):
        coverage(modes, again, 200)


def test_border_ratio():
    """1 for white noise and for one colour; for patches of one colour all steps are on borders; exact for a known picture."""
    noise = torch.rand(2, 3, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    assert border_ratio(noise, 4) == pytest.approx(torch.ones(2), abs=0.03)
    assert torch.equal(border_ratio(torch.full((1, 2, 3, 32, 32), 0.5), 4), torch.ones(1))
    ramp = (torch.arange(48) * 0.01 + (torch.arange(48) // 4) * 0.005).expand(1, 2, 3, 48, 48)
    steps = (0.015 + 0) / 2 / ((0.01 + 0) / 2)  # across and inside along the ramp, nothing across it
    assert border_ratio(ramp, 4) == pytest.approx(torch.tensor([steps]), rel=1e-3)
    with pytest.raises(ValueError, match="patch"):
        border_ratio(noise, 1)


def test_damages_are_what_they_say():
    videos = torch.rand(2, 5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = damaged(videos, 4, lambda v: v)
    assert torch.equal(found["codec"], videos) and torch.equal(found["reversed"], videos.flip(1))
    assert (found["frozen"].diff(dim=1) == 0).all() and torch.equal(found["frozen"][:, 0], videos[:, 2])
    assert found["strong_blur"].std() < found["mild_blur"].std() < videos.std()
    assert (border_ratio(found["grid"], 4) > border_ratio(videos, 4)).all()
    for clip, shuffled in zip(videos, found["shuffled"]):
        assert sorted(clip.flatten(1).sum(1).tolist()) == pytest.approx(sorted(shuffled.flatten(1).sum(1).tolist()))


def test_a_metric_that_orders_nothing_is_not_accepted():
    names = {name for _, chains in CLAIMS.values() for chain in chains for name in chain}
    per_clip = [m for m in CLAIMS if m not in ("frechet_distance", "coverage")]
    good = {name: i for i, name in enumerate(["real", "codec", "mild_blur", "mild_noise", "mean_of_ten", *sorted(names - {"real", "codec", "mild_blur", "mild_noise", "mean_of_ten"})])}  # fmt: skip
    value = lambda metric, name: -good[name] if CLAIMS[metric][0] else good[name]  # noqa: E731
    each = {name: {m: torch.full((12,), float(value(m, name))) for m in per_clip} for name in names}
    values = {name: {m: float(value(m, name)) for m in CLAIMS} for name in names}
    subjects = [i % 3 for i in range(12)]
    assert accepted(judged(each, values, subjects)) == list(CLAIMS)
    for name in names:
        each[name]["flicker"] = torch.zeros(12)
        values[name]["coverage"] = 0.5
    assert accepted(judged(each, values, subjects)) == [m for m in CLAIMS if m not in ("flicker", "coverage")]
