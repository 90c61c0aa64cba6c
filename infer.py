"""Generate videos with a trained student, or with the dense model.

    python infer.py ckpt=outputs/usv_mini/student prompt='"a cat, the camera pans left"'
    python infer.py ckpt=outputs/usv_mini/student prompts=data/prompts/camera_motion.txt seeds=2 compare=true
    python infer.py model=wan_i2v_14b ckpt=outputs/usv_wan_i2v/student image=cat.png prompt='"the cat jumps"'       # image to video
    python infer.py attention=svg2 prompt='"a cat, the camera pans left"'       # no training: a pattern on the dense model
    python infer.py ckpt=outputs/usv_mini/student attention=svg2 prompt=...   # the student's densities, SVG2's clusters
    python infer.py model=wan_1_3b ckpt=STUDENT dry_run=true                  # the memory it will need; offload=model|group, vae_tiling=true need less
    torchrun --nproc_per_node 2 infer.py ckpt=… prompts=FILE                    # prompts spread over processes; sequence_parallel=2: each video shared by two

Each prompt, seed and student gives an mp4 of its own, written as soon as it is made; a contact sheet and infer.json (seconds by stage, executed density, merging, attention recall
and the seconds of a pattern's stages, steps, seeds, commit) stand beside them. compare=true also runs the dense model at the same seeds and prints both.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import unicodedata
from dataclasses import asdict
from pathlib import Path

import hydra
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig
from PIL import Image, ImageOps
from tqdm import tqdm

import usv
from usv.config import InferConfig, SettingError, check_numbers, check_overrides, config_groups, typed
from usv.cpu import keep_freed_memory
from usv.files import checksum, write_text
from usv.patterns.planned import HOW_MUCH
from usv.sampling.checkpoint import read_config
from usv.sampling.decoder import load_decoder
from usv.sampling.generate import Generation, best_place, check_images, generated, load_pipeline, prompts_of, summed
from usv.sampling.patterns import calls_report, transformers_of
from usv.sampling.ranks import Crew, join
from usv.sampling.shared_pattern import share_pattern
from usv.training import dry_run_inference
from usv.training.build import prepare_folder
from usv.training.run import commit
from usv.video import contact_sheet, magnified, thumbnails, write_mp4

ROOT = Path(__file__).resolve().parent
SHEET_ROWS = 16  # prompts and seeds on the contact sheet
NAME_BYTES = 120  # of a prompt in a file's name; file systems take 255 in all
OFFLOADS = ("none", "model", "group")
RECALL_ROWS = 16  # query rows a call on which the attention recall of a pattern is measured, if its options say no other
ConfigStore.instance().store(name="infer_schema", node=InferConfig)


def read_prompts(config: InferConfig) -> list[str]:
    """The prompts asked for. SettingError when none or both ways are given, or the file cannot be read."""
    if (config.prompt is None) == (config.prompts is None):
        raise SettingError('prompt: give prompt="…" or prompts=FILE with one prompt a line, one of the two')
    if config.prompt is not None:
        return [config.prompt]
    return prompts_of(Path(config.prompts), "prompts=")


def read_images(config: InferConfig) -> list[Image.Image]:
    """The first frame, or the first and the last, upright, cut to the middle of the videos' shape and brought to their size. SettingError."""
    if config.last_image is not None and config.image is None:
        raise SettingError(f"last_image: got {config.last_image} without image, accepted: with image=PATH, the first frame")
    images = []
    for name in ("image", "last_image"):
        if (path := getattr(config, name)) is not None:
            try:
                image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                raise SettingError(f"{name}={path}: cannot be read as a picture ({error}); give a PNG or JPEG") from None
            images.append(ImageOps.fit(image, (config.model.width, config.model.height), Image.Resampling.LANCZOS))
    return images


def run(config: InferConfig) -> dict:
    """The whole job; returns what infer.json holds."""
    keep_freed_memory()
    check_numbers(config)
    if config.offload not in OFFLOADS:
        raise SettingError(f"offload: got {config.offload}, accepted: {' | '.join(OFFLOADS)}")
    if config.dry_run:
        if config.ckpt is not None:
            read_config(config.ckpt)
        return dry_run_inference.report(config)
    prompts, images = read_prompts(config), read_images(config)
    pattern = config.attention.pattern
    options = {"recall_rows": RECALL_ROWS, **config.attention.options} if pattern is not None else {}
    if config.ckpt is not None and pattern is not None:
        unused = [option for option in options if option in HOW_MUCH]
        options = {option: value for option, value in options.items() if option not in HOW_MUCH}
        print(f"{pattern} under the student's plan: the plan says how much, {', '.join(unused) or 'no option'} of {pattern} is not used")
    if config.ckpt is not None:
        read_config(config.ckpt)  # a wrong checkpoint shows before the model is loaded
        if config.ckpt_low is not None:
            read_config(config.ckpt_low)
            if config.compare:
                raise SettingError("compare: got true with ckpt_low, accepted: false; the dense experts have guidance scales of their own")
    elif config.ckpt_low is not None:
        raise SettingError("ckpt_low: got one without ckpt; give ckpt=HIGH ckpt_low=LOW, a student of each expert")
    elif config.compare and pattern is None:
        raise SettingError("compare=true compares with the dense model: also give ckpt=FOLDER or attention=svg2")
    asked = {name: getattr(config, name) for name in ("budget", "speedup", "costs") if getattr(config, name) is not None}
    if asked and config.ckpt is None:
        raise SettingError(f"{next(iter(asked))}: got one without ckpt, accepted: with ckpt=FOLDER of a student that carries damages")
    if config.sequence_parallel > 1 and ((config.ckpt is None) == (pattern is None) or config.compare):
        raise SettingError(f"sequence_parallel: got {config.sequence_parallel}, accepted: 1, or with a student or a pattern alone (one of ckpt=FOLDER and attention=, no compare); others spread prompts over processes")
    crew = join(config.sequence_parallel)
    try:
        return make(config, prompts, images, pattern, options, asked, crew)
    finally:
        crew.leave()


def make(config: InferConfig, prompts: list[str], images: list[Image.Image], pattern: str | None, options: dict, asked: dict, crew: Crew) -> dict:
    """This process's share of the videos, and of all processes the report. options: of the pattern; asked: budget, speedup, costs."""
    folder = Path(config.output_dir)
    prepare_folder(folder, crew.rank)
    dtype, device = best_place()
    pipe = load_pipeline(config.model.path, dtype, device if config.offload == "none" else "cpu")
    decoder = load_decoder(config.decoder, config.model.path, pipe)
    place(pipe, config, device)
    if decoder is not None:
        decoder.to(device)
    check_images(pipe, images)
    texts = [prompt for prompt in prompts for _ in range(config.seeds)]
    seeds = [config.seed + i for _ in prompts for i in range(config.seeds)]
    sparse = "student" if config.ckpt else pattern
    methods = (["dense"] if sparse is None or config.compare else []) + ([sparse] if sparse else [])
    out = Output(folder, config, methods, texts, seeds, crew)
    mine_texts, mine_seeds = [texts[i] for i in out.mine], [seeds[i] for i in out.mine]
    for name in methods:
        if name == "student":
            usv.enable(pipe, config.ckpt if config.ckpt_low is None else (config.ckpt, config.ckpt_low), impl=config.attention.impl, attention=pattern, **options, **asked)
            for transformer in transformers_of(pipe).values():
                transformer._planned.group = crew.sequence
        elif name == pattern:
            usv.enable(pipe, attention=pattern, impl=config.attention.impl, **options)
            if crew.sequence is not None:
                share_pattern(pipe, crew.sequence)
        steps = config.num_inference_steps or (pipe._usv.student.sampling.get("num_inference_steps") if name == "student" else None)
        with tqdm(total=len(mine_texts), desc=name, unit="video", disable=not crew.first) as bar:
            for batch in generated(pipe, config.model, mine_texts, mine_seeds, config.batch_size, steps, progress=bar, images=images, decoder=None if name == "dense" and sparse else decoder):
                out.add(name, batch, executed(pipe, name, pattern))
    return out.finish()


def place(pipe, config: InferConfig, device: str) -> None:
    """Offload and tiling as they are asked for."""
    if config.vae_tiling:
        pipe.vae.enable_tiling()
    if config.offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif config.offload == "group":
        pipe.enable_group_offload(torch.device(device), offload_type="leaf_level", use_stream=device != "cpu")


def executed(pipe, name: str, pattern: str | None) -> dict:
    """What the forwards of a method have computed so far, as shares of the dense ones."""
    if name == "dense":
        return {"density": 1.0, "merged": 0.0}
    record = pipe._usv.record
    merged = round(record.mean_merged(), 4) if name == "student" else 0.0
    calls = {"attention": pattern, **calls_report(record.calls)} if pattern is not None else {}
    return {"density": round(record.mean_density(), 4), "merged": merged, **calls}


class Output:
    """The files of a run, each written as soon as it can be: videos and infer.json after every batch, the contact sheet at the end.

    One file a prompt, seed and method; what a method is, its student, model and sampler included, is in the name as a hash. Of several
    processes each writes its videos; infer.json is rank 0's, of its own at first, of all at the end.
    """

    def __init__(self, folder: Path, config: InferConfig, methods: list[str], texts: list[str], seeds: list[int], crew: Crew):
        self.folder, self.config, self.texts, self.seeds, self.crew = folder, config, texts, seeds, crew
        self.mine = crew.mine(len(texts), config.batch_size)
        self.kinds = {name: identity(config, name) for name in methods}
        self.run = hashed([self.kinds, texts, seeds])
        asked = {name: getattr(config, name) for name in ("ckpt", "ckpt_low", "budget", "speedup", "costs", "image", "last_image")}
        self.report = {"run": self.run, "commit": commit(), "model": config.model.path, **asked, "methods": {}, "videos": []}
        self.seconds: dict[str, list[dict]] = {name: [] for name in methods}
        self.frames: dict[str, dict] = {name: {} for name in methods}
        if crew.first:
            self.set_aside()

    def set_aside(self) -> None:
        """An infer.json and contact sheet of another command keep their contents under names of their own."""
        try:
            earlier = json.loads((self.folder / "infer.json").read_text()).get("run", "earlier")
        except (OSError, ValueError, AttributeError):
            return
        if earlier != self.run:
            for name in ("infer.json", "contact_sheet.png"):
                file = self.folder / name
                if file.exists():
                    os.replace(file, file.with_name(f"{file.stem}-{str(earlier)[:16]}{file.suffix}"))

    def add(self, name: str, batch: Generation, executed: dict) -> None:
        """The next videos of a method."""
        done = sum(video["method"] == name for video in self.report["videos"])
        for index, video in zip(self.mine[done:], batch.videos):
            text, seed = self.texts[index], self.seeds[index]
            path = self.folder / file_name(text, seed, self.kinds[name], "-dense" if name == "dense" and len(self.kinds) > 1 else "")
            if self.crew.writes:
                write_mp4(path, video, self.config.fps or self.config.model.fps, scale=magnified(video.shape[-1]))
            self.report["videos"].append({"path": str(path), "prompt": text, "seed": seed, "method": name})
            if index < SHEET_ROWS:
                self.frames[name][index] = thumbnails(video)
        self.seconds[name].append(batch.seconds)
        seconds, count = summed(self.seconds[name]), done + len(batch.videos)
        self.report["methods"][name] = {
            "videos": count, "seconds": {stage: round(value, 6) for stage, value in seconds.items()}, "forwards_per_video": batch.forwards,
            **executed, "denoise_seconds_per_video": round(seconds["denoise"] / count, 6),
        }  # fmt: skip
        if self.crew.first:
            write_text(self.folder / "infer.json", json.dumps(self.report, indent=1))

    def collect(self) -> None:
        """What every process has made, in the order of prompts and seeds; collective."""
        everyone = self.crew.gather((self.report["videos"], self.report["methods"], self.frames) if self.crew.writes else ([], {}, {}))
        places = {(method, text, seed): i for method in self.kinds for i, (text, seed) in enumerate(zip(self.texts, self.seeds))}
        order = {name: i for i, name in enumerate(self.kinds)}
        videos = [video for theirs, _, _ in everyone for video in theirs]
        self.report["videos"] = sorted(videos, key=lambda v: (order[v["method"]], places[v["method"], v["prompt"], v["seed"]]))
        for name in self.kinds:
            self.report["methods"][name] = together([methods[name] for _, methods, _ in everyone if name in methods])
            self.frames[name] = {i: frame for _, _, frames in everyone for i, frame in frames.get(name, {}).items()}
        self.report["processes"] = self.crew.world

    def finish(self) -> dict:
        """The contact sheet and a table; returns what infer.json holds."""
        if self.crew.world > 1:
            self.collect()
            if not self.crew.first:
                return self.report
            write_text(self.folder / "infer.json", json.dumps(self.report, indent=1))
        rows = [
            (f"{name}: {self.texts[index]} (seed {self.seeds[index]})", frames[index])
            for index in range(min(len(self.texts), SHEET_ROWS))
            for name, frames in self.frames.items()
        ]
        contact_sheet(self.folder / "contact_sheet.png", rows)
        print_table(self.report["methods"])
        print(f"{len(self.report['videos'])} videos, contact_sheet.png and infer.json in {self.folder}")
        return self.report


def together(rows: list[dict]) -> dict:
    """One row of a method from those of several processes: sums of videos and seconds, of the rest means over videos. longest_seconds: of
    the process that worked longest."""
    count = sum(row["videos"] for row in rows)
    seconds = summed(row["seconds"] for row in rows)
    numbers = {key for row in rows for key, value in row.items() if isinstance(value, float)}
    means = {key: round(sum(row[key] * row["videos"] for row in rows) / count, 6) for key in numbers}
    return {**rows[0], **means, "videos": count, "seconds": seconds, "longest_seconds": max(sum(row["seconds"].values()) for row in rows)}


def hashed(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:10]


def identity(config: InferConfig, name: str) -> str:
    """A hash of all that decides a method's videos but prompt and seed."""
    parts = [asdict(config.model), config.num_inference_steps, config.fps, *([config.decoder] if config.decoder != "full" else []), "dense"]
    if config.image is not None:
        parts.insert(0, [checksum(Path(path)) for path in (config.image, config.last_image) if path is not None])
    if name != "dense":
        students = [read_config(path) for path in (config.ckpt, config.ckpt_low) if path is not None]
        parts = [*parts[:-1], students, asdict(config.attention)]
        if config.budget is not None or config.speedup is not None:
            parts.append([config.budget, config.speedup, None if config.costs is None else checksum(Path(config.costs))])
    return hashed(parts)


def file_name(prompt: str, seed: int, kind: str, suffix: str = "") -> str:
    """The prompt's letters, in any script, as far as a file system takes them, then a hash of all of the prompt and its method."""
    letters = re.sub(r"[\W_]+", "-", unicodedata.normalize("NFC", prompt).lower()).strip("-")
    letters = letters.encode()[:NAME_BYTES].decode(errors="ignore").strip("-")
    return f"{letters or 'video'}-{hashed([prompt, kind])}-s{seed}{suffix}.mp4"


def print_table(methods: dict[str, dict]) -> None:
    print(f"{'':10}{'forwards':>10}{'s/forward':>12}{'denoise s':>12}{'density':>10}{'merged':>9}")
    for name, row in methods.items():
        each = row["denoise_seconds_per_video"]
        print(f"{name:10}{row['forwards_per_video']:>10}{each / row['forwards_per_video']:>12.4f}{each:>12.2f}{row['density']:>10.3f}{row['merged']:>9.0%}")


@hydra.main(version_base="1.3", config_path="conf", config_name="infer")
def main(config: DictConfig) -> None:
    try:
        run(typed(config, InferConfig))
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    try:
        check_overrides(sys.argv[1:], InferConfig, config_groups(ROOT / "conf"))
    except SettingError as error:
        sys.exit(f"SettingError: {error}")
    main()
