"""Does each metric order the damage that it is there to see? Real clips, damaged in known ways, measured like any method's.

    python -m usv.evaluate --calibrate --clips 120 --out data/results/calibration.json

A claim is (metric, better, worse): the metric has to rank the two sets so, by a paired interval where it has a value for each clip, by its
value where it has one for the set. A metric one of whose claims fails is not accepted: tables mark it, and nothing is concluded from it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from tqdm import tqdm

from usv.config import ModelConfig
from usv.cpu import keep_freed_memory
from usv.evaluation.clips import FLOOR_SEED, REAL_CLIPS, asked_clips, real_clips, requests
from usv.evaluation.worlds import world_of
from usv.metrics import coverage, features, frechet_distance, paired_difference
from usv.metrics.summary import measure_videos
from usv.sampling.generate import best_place

# metric -> whether high is good, and its claims in chains: each set is better than the next
CLAIMS: dict[str, tuple[bool, list[tuple[str, ...]]]] = {
    "subject_accuracy": (True, [("real", "wrong_subject"), ("real", "mean_of_all")]),
    "motion_accuracy": (True, [("real", "frozen"), ("real", "shuffled"), ("real", "wrong_motion"), ("real", "reversed")]),
    "frechet_distance": (False, [("real", "codec", "mild_blur", "strong_blur"), ("real", "mild_noise", "strong_noise"), ("real", "grid"), ("real", "frozen"), ("real", "shuffled"), ("real", "mean_of_ten", "mean_of_all")]),  # fmt: skip
    "coverage": (True, [("real", "strong_blur"), ("real", "mean_of_all"), ("real", "frozen")]),
    "border_ratio": (False, [("real", "grid"), ("mild_blur", "grid")]),
    "flicker": (False, [("real", "strong_noise"), ("real", "shuffled")]),
    "flow_warp_error": (False, [("real", "mild_noise", "strong_noise"), ("real", "shuffled")]),
    "subject_consistency": (True, [("real", "shuffled"), ("real", "strong_noise")]),
}


def blur(videos: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian blur of every frame (B, T, 3, H, W), sigma in px."""
    reach = max(1, round(3 * sigma))
    taps = torch.exp(-(torch.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    taps = (taps / taps.sum()).expand(3, 1, 1, -1)
    flat = videos.flatten(0, 1)
    flat = F.conv2d(F.pad(flat, (reach, reach, 0, 0), mode="reflect"), taps, groups=3)
    return F.conv2d(F.pad(flat, (0, 0, reach, reach), mode="reflect"), taps.transpose(2, 3), groups=3).view_as(videos)


def noisy(videos: torch.Tensor, sigma: float) -> torch.Tensor:
    return (videos + sigma * torch.randn(videos.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)


def grid(videos: torch.Tensor, patch: int, size: float = 0.02) -> torch.Tensor:
    """Each patch of `patch` px a little too bright or too dark, as a codec that decodes patches alone leaves them."""
    height, width = (side // patch for side in videos.shape[3:])
    offsets = size * torch.randn(*videos.shape[:3], height, width, generator=torch.Generator().manual_seed(0))
    return (videos + offsets.repeat_interleave(patch, 3).repeat_interleave(patch, 4)).clamp(0, 1)


def damaged(videos: torch.Tensor, patch: int, round_trip: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
    """Name -> real clips (B, T, 3, H, W) damaged so. round_trip: through the codec and back."""
    frames, height = videos.shape[1], videos.shape[3]
    order = torch.stack([torch.randperm(frames, generator=torch.Generator().manual_seed(i)) for i in range(len(videos))])
    small = height / 96  # blur is told at 96 px
    return {
        "codec": round_trip(videos), "mild_blur": blur(videos, small), "strong_blur": blur(videos, 3 * small),
        "mild_noise": noisy(videos, 0.02), "strong_noise": noisy(videos, 0.08), "grid": grid(videos, patch),
        "frozen": videos[:, frames // 2 : frames // 2 + 1].expand_as(videos).clone(), "reversed": videos.flip(1),
        "shuffled": torch.stack([video[rows] for video, rows in zip(videos, order)]),
    }  # fmt: skip


def calibrate(
    real: torch.Tensor, subjects: list[int], motions: list[int], reference: torch.Tensor, prototypes, patch: int,
    round_trip: Callable[[torch.Tensor], torch.Tensor], mean_of: Callable[[int], torch.Tensor],
) -> dict:
    """Values of every metric on every damage, and whether its claims hold.

    real: clips (B, T, 3, H, W) that the reference features (n, D) were not made from, with their labels. mean_of(n): for each of the
    clips the mean of n other real clips of its caption (n 0: of all captions). Returns {"sets": {name: {metric: value}}, "claims": [...]}.
    """
    sets = {"real": (real, subjects, motions)}
    sets |= {name: (videos, subjects, motions) for name, videos in damaged(real, patch, round_trip).items()}
    turned = lambda labels: labels[1:] + labels[:1]  # noqa: E731
    sets["wrong_subject"] = (real, [(s + 1) % (max(subjects) + 1) for s in subjects], motions)
    sets["wrong_motion"] = (real, subjects, [m ^ 1 if isinstance(m, int) else (m[0] ^ 1, m[1]) for m in motions])
    sets["mean_of_ten"], sets["mean_of_all"] = (mean_of(10), subjects, motions), (mean_of(0), turned(subjects), motions)
    each, values = {}, {}
    for name, (videos, wanted_subjects, wanted_motions) in tqdm(sets.items(), unit="set"):
        each[name], pooled = measure_videos(videos, wanted_subjects, wanted_motions, prototypes=prototypes, patch=patch)
        values[name] = {metric: float(column.mean()) for metric, column in each[name].items()}
        values[name] |= {"frechet_distance": frechet_distance(reference, pooled), "coverage": coverage(reference, pooled)}
    return {"sets": {n: {k: round(v, 5) for k, v in row.items()} for n, row in values.items()}, "claims": judged(each, values, subjects)}


def judged(each: dict[str, dict[str, torch.Tensor]], values: dict[str, dict[str, float]], subjects: list[int]) -> list[dict]:
    """A row for each claim: metric, the two sets, their difference or values, and whether it holds."""
    rows = []
    for metric, (high_is_good, chains) in CLAIMS.items():
        for better, worse in dict.fromkeys(pair for chain in chains for pair in zip(chain, chain[1:])):
            row = {"metric": metric, "better": better, "worse": worse, "values": [round(values[s][metric], 5) for s in (better, worse)]}
            if metric in each[better]:
                difference = paired_difference(each[worse][metric], each[better][metric], subjects)
                row["interval"] = [round(difference.low, 5), round(difference.high, 5)]
                row["holds"] = difference.low > 0 if high_is_good else difference.high < 0
            else:
                row["holds"] = (values[better][metric] > values[worse][metric]) == high_is_good and values[better][metric] != values[worse][metric]
            rows.append(row)
    return rows


def accepted(claims: list[dict]) -> list[str]:
    """The metrics all of whose claims hold."""
    failed = {row["metric"] for row in claims if not row["holds"]}
    return [metric for metric in CLAIMS if metric not in failed]


def table(report: dict) -> str:
    """The calibration as Markdown: a row for each damage, then what failed."""
    metrics = list(CLAIMS)
    lines = ["| real clips | " + " | ".join(metrics) + " |", "|---" * (len(metrics) + 1) + "|"]
    for name, row in report["sets"].items():
        lines.append(f"| {name} | " + " | ".join(f"{row[m]:.3f}" if row[m] < 10 else f"{row[m]:.0f}" for m in metrics) + " |")
    failed = [f"{c['metric']}: {c['better']} should be better than {c['worse']}, {c['values']}" for c in report["claims"] if not c["holds"]]
    lines += ["", f"Accepted: {', '.join(accepted(report['claims']))}.", *(f"Fails: {line}" for line in failed)]
    return "\n".join(lines)


def calibration(model: ModelConfig, clips: int) -> dict:
    """The report of `python -m usv.evaluate --calibrate`: sets, claims and the metrics that are accepted."""
    keep_freed_memory()
    vae = AutoencoderKLWan.from_pretrained(model.path, subfolder="vae").to(best_place()[1]).eval()
    _, subjects, motions, labels = requests(model, clips)
    real, real_subjects = real_clips(model, REAL_CLIPS)
    result = calibrate(
        asked_clips(model, labels, FLOOR_SEED), subjects, motions, features(real), world_of(model).teller(real, real_subjects),
        vae.config.scale_factor_spatial, lambda videos: round_trip(vae, videos),
        lambda count: asked_clips(model, labels, FLOOR_SEED + 1, count) if count else real.mean(0).expand(clips, -1, -1, -1, -1),
    )  # fmt: skip
    return {"clips": clips, **result, "accepted": accepted(result["claims"])}


@torch.no_grad()
def round_trip(vae: AutoencoderKLWan, videos: torch.Tensor, batch_size: int = 8) -> torch.Tensor:
    """Videos (B, T, 3, H, W) in [0, 1] through the codec and back."""
    out = []
    for part in videos.split(batch_size):
        latents = vae.encode((part * 2 - 1).transpose(1, 2).to(vae.device, vae.dtype)).latent_dist.mode()
        out.append((vae.decode(latents, return_dict=False)[0].float().cpu() / 2 + 0.5).clamp(0, 1).transpose(1, 2))
    return torch.cat(out)
