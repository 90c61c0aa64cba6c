"""python -m usv.models: every video pipeline class of the installed diffusers, and what of USV runs on it.

A row is a class that diffusers exports, is a DiffusionPipeline, and makes videos: its call takes num_frames, frames or video,
or its file prepares or returns frames through a VideoProcessor. What the row says comes from the classes of the pipeline's
denoiser: `usv.patterns.processors` for patterns, the families of `usv.models` for students. docs/models.md is its output.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import sys
from dataclasses import astuple, dataclass

import diffusers

from usv.models.families import families
from usv.patterns import PATTERNS
from usv.patterns.processors import FAMILIES, REFUSED, refusal

# pipeline whose student train.py trains -> what it is told
TRAINING = {
    "WanPipeline": "experiment=usv_wan", "WanImageToVideoPipeline": "experiment=usv_wan_i2v", "HunyuanVideoPipeline": "experiment=usv_hunyuan",
    "HunyuanVideo15Pipeline": "experiment=usv_hunyuan15", "CogVideoXPipeline": "experiment=usv_cogvideox", "LTXPipeline": "experiment=usv_ltx",
}  # fmt: skip
# classes of a pipeline's parts that denoise
DENOISERS = ("transformer", "transformer_2", "unet")
HEAD = ("pipeline", "attention", "patterns", "student", "training", "refused, because")


@dataclass(frozen=True)
class Row:
    """What runs on one pipeline class; `-` for nothing. refused: why neither does."""

    pipeline: str
    attention: str
    patterns: str
    student: str
    training: str
    refused: str


def video_pipelines() -> dict[str, type]:
    """The video pipeline classes of the installed diffusers by name, in alphabetical order."""
    found = {}
    for name in sorted(dir(diffusers)):
        if "Pipeline" not in name:
            continue
        with contextlib.suppress(ImportError, RuntimeError):  # what another optional package is missing for
            cls = getattr(diffusers, name)
            if inspect.isclass(cls) and issubclass(cls, diffusers.DiffusionPipeline) and _makes_video(cls):
                found[name] = cls
    return found


def _makes_video(cls: type) -> bool:
    takes = {"num_frames", "frames", "video"} & set(inspect.signature(cls.__call__).parameters)
    return bool(takes) or hasattr(sys.modules[cls.__module__], "VideoProcessor")


def denoisers(cls: type) -> list[str]:
    """Names of the classes that a pipeline's constructor takes for its denoiser."""
    parameters = inspect.signature(cls.__init__).parameters
    said = " ".join(str(parameters[part].annotation) for part in DENOISERS if part in parameters)
    return list(dict.fromkeys(word for word in re.findall(r"\w+", said) if word in FAMILIES or word in REFUSED or word[-5:] == "Model"))


def row(name: str, cls: type) -> Row:
    """What runs on a pipeline class."""
    known = denoisers(cls)
    if not known:
        return Row(name, "none", "-", "-", "-", "it has no denoising transformer")
    denoiser = known[-1]
    if denoiser not in FAMILIES:
        return Row(name, REFUSED[denoiser][0] if denoiser in REFUSED else "?", "-", "-", "-", refusal(denoiser))
    student = next((family.name for family in families() if denoiser in (c.__name__ for c in family.transformers)), "-")
    return Row(name, FAMILIES[denoiser].attention, "all", student, TRAINING.get(name, "-"), "")


def rows() -> list[Row]:
    """A row for each video pipeline class."""
    return [row(name, cls) for name, cls in video_pipelines().items()]


def page() -> str:
    """docs/models.md."""
    found = rows()
    lines = [
        "# Pipelines",
        "",
        f"The output of `python -m usv.models` for diffusers {diffusers.__version__}: its {len(found)} video pipeline classes, of which "
        f"patterns run on {sum(r.patterns != '-' for r in found)} and students on {sum(r.student != '-' for r in found)}. "
        "Every row is a run on a tiny random instance: patterns by `tests/models/test_table.py`, students by `tests/models/test_students.py`.",
        "",
        f"*patterns*: all of {', '.join(f'`{name}`' for name in PATTERNS)} by `usv.enable(pipe, attention=…)`. *student*: the family "
        "whose students `usv.enable(pipe, folder)` takes; *training*: what `train.py` is told. *attention*: what the long attention "
        "of a block sees; text, history and conditions beside the video's own tokens stay dense in rows and columns, and are not merged.",
        "",
        "Refused in a call, by name: under a pattern any mask of the video's attention (SkyReels-V2's `causal_block_size`, a reference's "
        "strength in LTX2InContextPipeline, Kandinsky 5's NABLA); beside a student SkyReels-V2's, spatio-temporal guidance of LTX-2, since "
        "guidance is folded in, and a pattern's blocks where tokens stand beside the grid (in joint attention `usv.enable` refuses them). "
        "Processes cannot share such a sample in training.",
        "",
        f"| {' | '.join(HEAD)} |",
        "|" + "---|" * len(HEAD),
        *(f"| {' | '.join(astuple(r))} |" for r in found),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    print(page(), end="")


if __name__ == "__main__":
    main()
