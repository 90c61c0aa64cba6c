"""Generate videos with a trained student, or with the dense model.

    python infer.py ckpt=outputs/usv_mini/student prompt='"a cat, the camera pans left"'
    python infer.py ckpt=outputs/usv_mini/student prompts=data/prompts/camera_motion.txt seeds=2 compare=true
    python infer.py attention=svg2 prompt='"a cat, the camera pans left"'       # no training: a pattern on the dense model
    python infer.py ckpt=outputs/usv_mini/student attention=svg2 prompt=...   # the student's densities, SVG2's clusters

Each prompt and seed gives an mp4; a contact sheet and infer.json (seconds by stage, executed density, merging, attention recall
and the seconds of a pattern's stages, steps, seeds, commit) stand beside them. compare=true also runs the dense model at the same seeds and prints both.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig
from tqdm import tqdm

import usv
from usv.config import InferConfig, SettingError, check_overrides, config_groups, typed
from usv.cpu import keep_freed_memory
from usv.patterns.planned import HOW_MUCH
from usv.sampling.checkpoint import read_config
from usv.sampling.generate import Generation, best_place, generate, load_pipeline
from usv.sampling.patterns import calls_report
from usv.training.build import prepare_folder
from usv.training.run import commit
from usv.video import contact_sheet, write_mp4

ROOT = Path(__file__).resolve().parent
RECALL_ROWS = 16  # query rows a call on which the attention recall of a pattern is measured, if its options say no other
ConfigStore.instance().store(name="infer_schema", node=InferConfig)


def read_prompts(config: InferConfig) -> list[str]:
    """The prompts asked for. SettingError when none or both ways are given, or the file cannot be read."""
    if (config.prompt is None) == (config.prompts is None):
        raise SettingError('prompt: give prompt="…" or prompts=FILE with one prompt a line, one of the two')
    if config.prompt is not None:
        return [config.prompt]
    path = Path(config.prompts)
    if not path.is_file():
        raise SettingError(f"prompts={path}: no such file; give a text file with one prompt a line")
    lines = [line.strip() for line in path.read_text().splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise SettingError(f"prompts={path}: holds no prompt; put one on each line")
    return lines


def run(config: InferConfig) -> dict:
    """The whole job; returns what infer.json holds."""
    keep_freed_memory()
    for name in ("seeds", "batch_size", "fps", "num_inference_steps"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise SettingError(f"{name}: got {value}, accepted: at least 1")
    prompts = read_prompts(config)
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
    folder = Path(config.output_dir)
    prepare_folder(folder)
    pipe = load_pipeline(config.model.path, *best_place())
    texts = [prompt for prompt in prompts for _ in range(config.seeds)]
    seeds = [config.seed + i for _ in prompts for i in range(config.seeds)]
    methods: dict[str, tuple[Generation, dict]] = {}
    sparse = "student" if config.ckpt else pattern
    for name in (["dense"] if sparse is None or config.compare else []) + ([sparse] if sparse else []):
        executed = {"density": 1.0, "merged": 0.0}
        if name == "student":
            usv.enable(pipe, config.ckpt if config.ckpt_low is None else (config.ckpt, config.ckpt_low), impl=config.attention.impl, attention=pattern, **options)
        elif name == pattern:
            usv.enable(pipe, attention=pattern, impl=config.attention.impl, **options)
        steps = config.num_inference_steps or (pipe._usv.student.sampling.get("num_inference_steps") if name == "student" else None)
        with tqdm(total=len(texts), desc=name, unit="video") as bar:
            result = generate(pipe, config.model, texts, seeds, config.batch_size, steps, progress=bar)
        if name == "student":
            record = pipe._usv.record
            executed = {"density": round(record.mean_density(), 4), "merged": round(record.mean_merged(), 4)}
        elif name == pattern:
            record = pipe._usv.record
            executed = {"density": round(record.mean_density(), 4), "merged": 0.0}
        if name in ("student", pattern) and pattern is not None:
            executed |= {"attention": pattern, **calls_report(record.calls)}
        methods[name] = (result, executed)
    return write(folder, config, texts, seeds, methods)


def write(folder: Path, config: InferConfig, texts: list[str], seeds: list[int], methods: dict) -> dict:
    """Videos, contact sheet and infer.json."""
    report = {"commit": commit(), "ckpt": config.ckpt, "ckpt_low": config.ckpt_low, "model": config.model.path, "methods": {}, "videos": []}
    rows = []
    for name, (result, executed) in methods.items():
        seconds = {stage: round(value, 6) for stage, value in result.seconds.items()}
        count = len(texts)
        report["methods"][name] = {
            "videos": count, "seconds": seconds, "forwards_per_video": result.forwards, **executed,
            "denoise_seconds_per_video": round(result.seconds["denoise"] / count, 6),
        }  # fmt: skip
        for index, (text, seed) in enumerate(zip(texts, seeds)):
            stem = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60]
            path = folder / f"{stem}-s{seed}{'-dense' if name == 'dense' and len(methods) > 1 else ''}.mp4"
            write_mp4(path, result.videos[index], config.fps or config.model.fps, scale=max(1, 384 // result.videos.shape[-1]))
            report["videos"].append({"path": str(path), "prompt": text, "seed": seed, "method": name})
    for index in range(min(len(texts), 16)):
        rows += [(f"{name}: {texts[index]} (seed {seeds[index]})", result.videos[index]) for name, (result, _) in methods.items()]
    contact_sheet(folder / "contact_sheet.png", rows)
    temporary = folder / ".infer.json.tmp"
    temporary.write_text(json.dumps(report, indent=1))
    os.replace(temporary, folder / "infer.json")
    print_table(report["methods"])
    print(f"{len(report['videos'])} videos, contact_sheet.png and infer.json in {folder}")
    return report


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
