"""Train the embedded model of the world MovingThings from nothing. One command, resumable from its last minute:

    python data/build_moving_things.py --compile                                  # hours on two cores, minutes on a GPU
    python data/build_moving_things.py --sheet sheet.png                          # look at what it draws now, at the stage's size
    python data/build_moving_things.py --keep                                     # write what stands to --out, to be committed

Without a checkpoint in --work it goes on from training.safetensors in --out: the running average of an earlier machine's training, with a
fresh optimiser, in the latents of the codec that lies beside it.

Curriculum: places on pure noise (data/build_wan_mini.py says why), half-size clips, then the full grid, each first in every other frame:
what moves where shows in five frames of nine, for half of the work. Clips are drawn without end, a
share of each batch new and the rest from the last few thousand; no clip is one of `moving_things.held_out`. Two linear
read-outs help and are thrown away afterwards: where a token is (block 2), and what is seen there and how it moves (block 4).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import build_wan_mini as mini  # noqa: E402
import moving_things as world  # noqa: E402
import wan_mini_parts as parts  # noqa: E402

from usv.cpu import keep_freed_memory  # noqa: E402


@dataclass(frozen=True)
class Stage:
    """One stage: clip side (px), every how manieth frame, clips seen at its end, batch, peak learning rate, shift of the noise levels."""

    name: str
    size: int
    every: int
    clips: int
    batch: int
    lr: float
    shift: float
    cooldown: bool = False


STAGES = [
    Stage("half size, every other frame", 48, 2, 120_000, 32, 2.0e-3, 4.0),
    Stage("half size", 48, 1, 8_000, 32, 2.0e-3, 4.0),
    Stage("full grid, every other frame", 96, 2, 86_000, 8, 1.5e-3, 4.0),
    Stage("full grid", 96, 1, 16_000, 8, 1.5e-3, 4.0, cooldown=True),
]
LAYOUT_BLOCK, LAYOUT_WEIGHT, PLACES_WEIGHT = 4, 0.5, 0.1
TEXT_LENGTH = 48
FRESH, POOL, FIRST = 6, 8_192, 512  # new clips a batch of 32, clips kept, clips made before the first step
TRAIN_SEED = 1


def make_tokenizer():
    """The words of MovingThings and its other wordings, and letters for what else a person types."""
    said = [*world.THINGS, *world.PLACES, *sum(world.MOTIONS.values(), ()), *sum(world.CAMERAS.values(), ()), *world.OPENINGS]
    return parts.make_tokenizer(" ".join([*said, "the camera"]))


def video(clip: world.Clip) -> torch.Tensor:
    """(3, T, H, W) in [-1, 1]."""
    return clip.frames.permute(1, 0, 2, 3).float() / 127.5 - 1


def build_codec(folder: Path) -> None:
    """Fit the codec to clips of the training stream; write vae, tokenizer and scheduler."""
    if (folder / "vae" / "config.json").exists():
        return
    videos = torch.stack([video(world.sample_clip(i * 7, TRAIN_SEED)) for i in range(96)])
    vae = parts.make_vae(*parts.fit_pca(videos))
    parts.lap_decoder(vae, videos)
    mini.save_folder(folder, vae=vae, tokenizer=make_tokenizer(), scheduler=parts.make_scheduler())
    mini.write_settings(folder, TEXT_LENGTH, world="moving_things")


def frames_of(stage: Stage) -> int:
    return (parts.NUM_FRAMES - 1) // stage.every + 1


class Clips:
    """The endless training stream of one stage's size and frames, encoded: `draw` gives a batch, a few of it new."""

    def __init__(self, vae, stage: Stage, position: int):
        self.vae, self.size, self.next = vae, stage.size, max(0, position - FIRST)
        self.frames = frames_of(stage)
        self.std = torch.tensor(vae.config.latents_std).view(-1, 1, 1, 1)
        self.pool: list[tuple[torch.Tensor, torch.Tensor, str]] = []
        for _ in tqdm(range(FIRST), desc=f"first clips, {stage.size} px", leave=False):
            self.add()

    def add(self) -> None:
        clip = world.sample_clip(self.next, TRAIN_SEED, self.frames, self.size, self.size // (2 * parts.PATCH), words=True)
        with torch.no_grad():
            latents = self.vae.encode(video(clip)[None]).latent_dist.mode()[0] / self.std
        self.pool.append((latents.half(), clip.layout.half(), clip.caption))
        self.next += 1
        if len(self.pool) > POOL:
            self.pool.pop(0)

    def draw(self, batch: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        """Latents (B, 16, T, h, w), layouts (B, T, g, g, LAYOUT) fp32 and captions."""
        fresh = max(1, round(FRESH * batch / 32))
        for _ in range(fresh):
            self.add()
        old = torch.randint(len(self.pool) - fresh, (batch - fresh,), generator=generator).tolist()
        chosen = [self.pool[i] for i in (*old, *range(len(self.pool) - fresh, len(self.pool)))]
        return torch.stack([c[0] for c in chosen]).float(), torch.stack([c[1] for c in chosen]).float(), [c[2] for c in chosen]


class Layout(torch.nn.Module):
    """Linear read-out of `Clip.layout` from the output of one block. Not part of the teacher."""

    def __init__(self, model):
        super().__init__()
        self.read = torch.nn.Linear(model.config.num_attention_heads * model.config.attention_head_dim, world.LAYOUT)
        self.hidden = None
        model.blocks[LAYOUT_BLOCK].register_forward_hook(lambda module, inputs, output: setattr(self, "hidden", output))

    def loss(self, layout: torch.Tensor) -> torch.Tensor:
        hidden = torch.nn.functional.layer_norm(self.hidden, self.hidden.shape[-1:])
        return (self.read(hidden) - layout.flatten(1, 3)).square().mean()


class Training:
    """Networks, read-outs, optimiser, running average and position; all of it in one checkpoint."""

    def __init__(self, folder: Path, work: Path):
        from diffusers import AutoencoderKLWan
        from transformers import T5TokenizerFast

        self.folder, self.work, self.kept = folder, work, folder / "training.safetensors"
        self.tokenizer = T5TokenizerFast.from_pretrained(folder / "tokenizer")
        self.vae = AutoencoderKLWan.from_pretrained(folder / "vae")
        torch.manual_seed(0)
        self.model, self.encoder = parts.make_transformer(), parts.make_text_encoder(len(self.tokenizer))
        self.places, self.layout = mini.Places(self.model), Layout(self.model)
        self.modules = {"model": self.model, "encoder": self.encoder, "places": self.places, "layout": self.layout}
        self.params = [p for m in self.modules.values() for p in m.parameters()]
        self.optimizer = mini.Optimizers(self.model, self.params)
        self.ema = [p.detach().clone() for p in self.params]
        self.state = {"stage": 0, "step": 0, "clips": 0, "seconds": 0.0}
        self.checkpoint = work / "teacher.pt"
        if not self.checkpoint.exists() and self.kept.exists():
            self.restore()
        if self.checkpoint.exists():
            saved = torch.load(self.checkpoint, weights_only=True)
            for name, module in self.modules.items():
                module.load_state_dict(saved[name])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.ema, self.state = saved["ema"], saved["state"]

    def named(self) -> list[str]:
        """A name for each of `params`."""
        return [f"{kind}.{name}" for kind, module in self.modules.items() for name, _ in module.named_parameters()]

    def keep(self) -> None:
        """Write the running average in fp16, which needs a fifth of a checkpoint's room, and where it stands."""
        save_file({name: e.half() for name, e in zip(self.named(), self.ema)}, self.kept, {"state": json.dumps(self.state)})

    @torch.no_grad()
    def restore(self) -> None:
        kept = load_file(self.kept)
        for name, p, e in zip(self.named(), self.params, self.ema):
            p.copy_(kept[name])
            e.copy_(kept[name])
        with safe_open(self.kept, "pt") as file:
            self.state = json.loads(file.metadata()["state"])
        self.state["warm"] = self.state["step"]

    def save(self) -> None:
        mini.save_state(self.checkpoint, {**self.modules, "optimizer": self.optimizer}, self.ema, self.state)

    def embed(self, captions: list[str]) -> torch.Tensor:
        """(B, L, D), zeros beyond each caption's end, as WanPipeline makes them."""
        batch = self.tokenizer(captions, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt")
        hidden = self.encoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        return hidden * batch.attention_mask[..., None]

    def losses(self, clips: Clips, stage: Stage) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Flow matching, and what the two read-outs do not know."""
        generator = torch.Generator().manual_seed(self.state["step"])
        x0, layout, captions = clips.draw(stage.batch, generator)
        drop = torch.rand(stage.batch, generator=generator) < 0.1
        text = self.embed(["" if d else c for c, d in zip(captions, drop)])
        u = (torch.arange(stage.batch) + torch.rand(stage.batch, generator=generator)) / stage.batch  # stratified
        u = u[torch.randperm(stage.batch, generator=generator)]
        sigma = mini.sigma_with_shift(u, stage.shift).view(-1, 1, 1, 1, 1)
        noise = torch.randn(x0.shape, generator=generator)
        velocity = self.model((1 - sigma) * x0 + sigma * noise, sigma.flatten() * 1000, text, return_dict=False)[0]
        loss = (velocity - (noise - x0)).square().mean()
        return loss, self.places.loss((x0.shape[2], x0.shape[3] // 2, x0.shape[4] // 2), stage.every), self.layout.loss(layout)

    def average(self, cooldown: bool) -> None:
        """Over about a thousand steps, or two hundred where the rate falls: earlier ones are farther from where it ends."""
        step = self.state["step"]
        torch._foreach_lerp_(self.ema, [p.detach() for p in self.params], 1 - min(0.995 if cooldown else 0.999, step / (step + 20)))


def run_stage(training: Training, stage: Stage, until: float) -> bool:
    """Train to the stage's number of clips, or to the time `until` (monotonic seconds). True when the stage is done."""
    state, before = training.state, sum(s.clips for s in STAGES[: training.state["stage"]])
    clips = Clips(training.vae, stage, state["clips"])
    mini.strided_rope(training.model, parts.SIZE // stage.size, stage.every)
    log = open(training.work / "teacher.jsonl", "a")
    bar = tqdm(total=stage.clips, initial=state["clips"] - before, desc=stage.name, unit="clip")
    last = saved = time.monotonic()
    running: dict[str, float] = {}
    while state["clips"] - before < stage.clips and time.monotonic() < until:
        values = dict(zip(("loss", "place", "layout"), training.losses(clips, stage)))
        (values["loss"] + PLACES_WEIGHT * values["place"] + LAYOUT_WEIGHT * values["layout"]).backward()
        norm = float(torch.nn.utils.clip_grad_norm_(training.params, 1.0))
        if not math.isfinite(norm):
            raise RuntimeError(f"gradient norm {norm} at step {state['step']}; the last good state is {training.checkpoint}")
        lr = stage.lr * min(1.0, (state["step"] - state.get("warm", 0) + 1) / 200)  # of an optimiser that was fresh at `warm`
        if stage.cooldown:
            lr *= 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (state["clips"] - before) / stage.clips))
        training.optimizer.step(lr)
        training.average(stage.cooldown)
        now = time.monotonic()
        state.update(step=state["step"] + 1, clips=state["clips"] + stage.batch, seconds=state["seconds"] + min(now - last, 60.0))
        last = now
        for name, value in values.items():
            running[name] = 0.98 * running.get(name, float(value.detach())) + 0.02 * float(value.detach())
        bar.update(stage.batch)
        bar.set_postfix({k: f"{v:.4f}" for k, v in running.items()} | {"step": state["step"]})
        if state["step"] % 20 == 0:
            log.write(json.dumps({"name": stage.name, "norm": round(norm, 4), **{k: round(v, 5) for k, v in running.items()}, **state}) + "\n")
            log.flush()
        if now - saved > 60:
            training.save()
            saved = now
    training.save()
    return state["clips"] - before >= stage.clips


@torch.no_grad()
def sample(training: Training, captions: list[str], stage: Stage, steps: int, guidance: float, seed: int = 0) -> torch.Tensor:
    """Clips (B, T, 3, H, W) in [0, 1] of the running average by Euler steps at the sampler's own shift; guidance 1: one forward a step."""
    own = [p.detach().clone() for p in training.params]
    for p, e in zip(training.params, training.ema):
        p.copy_(e)
    side = stage.size // parts.PATCH
    mini.strided_rope(training.model, parts.SIZE // stage.size, stage.every)
    x = torch.randn(len(captions), parts.Z_DIM, frames_of(stage), side, side, generator=torch.Generator().manual_seed(seed))
    text, empty = training.embed(captions), training.embed([""] * len(captions))
    sigmas = mini.sigma_with_shift(torch.linspace(1, 0, steps + 1), parts.FLOW_SHIFT)
    for now, following in zip(sigmas, sigmas[1:]):
        timestep = torch.full((len(captions),), 1000 * float(now))
        velocity = training.model(x, timestep, text, return_dict=False)[0]
        if guidance != 1.0:
            away = training.model(x, timestep, empty, return_dict=False)[0]
            velocity = away + guidance * (velocity - away)
        x = x + (following - now) * velocity
    frames = training.vae.decode(x * torch.tensor(training.vae.config.latents_std).view(1, -1, 1, 1, 1)).sample
    for p, o in zip(training.params, own):
        p.copy_(o)
    return ((frames + 1) / 2).clamp(0, 1).transpose(1, 2)


def sheet(training: Training, path: Path, steps: int, guidance: float, count: int = 12) -> None:
    """A picture of `count` clips, each in five of its frames, captions of unseen triples last."""
    from PIL import Image

    generator = torch.Generator().manual_seed(99)
    drawn = [world.labels(generator, hold_out=False) for _ in range(400)]
    chosen = [d for d in drawn if not world.held_out(d[0], d[2], d[3])][: count * 3 // 4]
    chosen += [d for d in drawn if world.held_out(d[0], d[2], d[3])][: count - len(chosen)]
    captions = [world.caption(*labels) for labels in chosen]
    clips = sample(training, captions, STAGES[min(training.state["stage"], len(STAGES) - 1)], steps, guidance)
    rows = torch.cat([torch.cat([*clip[:: (clips.shape[1] - 1) // 4]], -1) for clip in clips], -2)
    rows = torch.cat(rows.chunk(2, -2), -1) if count % 2 == 0 else rows
    Image.fromarray((rows * 255).byte().permute(1, 2, 0).numpy()).resize((rows.shape[2] * 2, rows.shape[1] * 2)).save(path)
    print("\n".join(captions), path, sep="\n")


def finish(training: Training) -> None:
    """Write transformer and text encoder, and the pipeline's index."""
    with torch.no_grad():
        for p, e in zip(training.params, training.ema):
            p.copy_(e)
    mini.strided_rope(training.model, 1)
    mini.save_folder(training.folder, transformer=training.model.eval(), text_encoder=training.encoder.eval())
    mini.write_index(training.folder)
    training.kept.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=HERE / "cache" / "moving-things", help="checkpoint and log")
    parser.add_argument("--out", type=Path, default=HERE / "moving-things", help="the diffusers folder to write")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so many, to go on another time")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compile", action="store_true", help="torch.compile the blocks: a fifth less time a step on CPU, a minute more at the start")
    parser.add_argument("--keep", action="store_true", help="write what stands to --out and leave")
    parser.add_argument("--sheet", type=Path, help="draw a picture of what stands and leave")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=3.0)
    args = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + 60 * args.minutes
    build_codec(args.out)
    training = Training(args.out, args.work)
    if args.sheet:
        sheet(training, args.sheet, args.steps, args.guidance)
        return
    if args.keep:
        training.keep()
        return
    if args.compile:
        training.model.compile_repeated_blocks()
    if training.state["step"] == 0:
        mini.learn_places(training.model, training.places, training.optimizer, TEXT_LENGTH)
        training.ema = [p.detach().clone() for p in training.params]
    while training.state["stage"] < len(STAGES):
        if not run_stage(training, STAGES[training.state["stage"]], until):
            print(f"stopped at {training.state}; the same command goes on")
            return
        training.state["stage"] += 1
        training.save()
    finish(training)


if __name__ == "__main__":
    main()
