"""What else is done to a pipeline, before `usv.enable` and after: python tests/together.py > docs/together.md"""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
import logging
import os
import sys
import tempfile
import warnings
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import version
from pathlib import Path

import lora_files
import tiny
import torch
from diffusers import WanPipeline
from treatments import COLUMNS, ROWS, UNTREATED, Row

import usv
from usv.models.forward import SparseTransformer
from usv.sampling.checkpoint import CheckpointError, Student, save_student
from usv.sampling.enable import Enabled
from usv.sampling.generate import load_pipeline
from usv.sampling.sampler import StudentScheduler
from usv.sparse.grid import Tile
from usv.sparse.plan import Rung, SparsityPlan, timestep_bins

SAMPLING = {"height": tiny.SIZE, "width": tiny.SIZE, "num_frames": tiny.FRAMES, "num_inference_steps": 2, "max_sequence_length": tiny.TEXT, "flow_shift": 3.0}
STEPS = [1000.0, 400.0]
WHOLE = SparsityPlan(timestep_bins(2, 3.0), ((Rung(), Rung()),) * 2)
SPARSE = SparsityPlan(timestep_bins(2, 3.0), ((Rung(1, 0), Rung(2, 2)), (Rung(), Rung(1, 1))))
ROUTER = tiny.ROOT / "data" / "results" / "router_wan_mini.json"  # of tests/router.py
REFUSALS = (CheckpointError, ValueError, NotImplementedError)


# ---- the pipelines ------------------------------------------------------------------------------------------------------------------------


class Bench:
    """A tiny Wan and its students in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        logging.getLogger("diffusers").setLevel(logging.ERROR)  # advice about formats that the rows are made of
        self.loaded = load_pipeline(str(tiny.save_model(folder / "wan")))
        for name, plan in (("whole", WHOLE), ("sparse", SPARSE)):
            for kind, more in (("student", {}), ("few-step student", {"student_timesteps": STEPS}), ("router's student", {"guidance_scale": 1.0})):
                model = SparseTransformer(copy.deepcopy(self.loaded.transformer), Tile(*tiny.TILE)).eval().requires_grad_(False)
                for gate in model.gates:
                    torch.nn.init.normal_(gate.weight, std=0.2, generator=torch.Generator().manual_seed(0))
                save_student(folder / kind / name, Student(model, plan, {**SAMPLING, **more}, router="router" in kind))
        self.update = lora_files.style(self.loaded.transformer)
        self.dense = functools.lru_cache(maxsize=None)(self._dense)
        self.plain = functools.lru_cache(maxsize=None)(self._plain)

    def pipe(self) -> WanPipeline:
        pipe = WanPipeline(**{name: copy.deepcopy(part) for name, part in self.loaded.components.items()})
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def enable(self, pipe, column: str, plan: str):
        if column == "pattern":
            return usv.enable(pipe, attention="tile_top_k", tile=(1, 2, 2), density=1.0 if plan == "whole" else 0.5, dense_layers=0.0, dense_steps=0.0)
        return usv.enable(pipe, self.folder / column / plan)

    def _dense(self, row: Row, few: bool) -> torch.Tensor:
        """The dense pipeline, treated."""
        pipe = self.pipe()
        if few:
            pipe.scheduler = StudentScheduler(STEPS)
        return video(row.treat(self, pipe))

    def _plain(self, column: str) -> torch.Tensor:
        """The enabled pipeline at half of the blocks, not treated."""
        return video(self.enable(self.pipe(), column, "sparse"))


def video(pipe) -> torch.Tensor:
    text = torch.randn(1, tiny.TEXT, 64, generator=torch.Generator().manual_seed(1))
    frames = tiny.FRAMES if isinstance(getattr(pipe, "_usv", None), Enabled) else tiny.FRAMES - 1
    return pipe(
        prompt_embeds=text, height=tiny.SIZE, width=tiny.SIZE, num_frames=frames, num_inference_steps=2, guidance_scale=1.0, max_sequence_length=tiny.TEXT,
        generator=torch.Generator().manual_seed(0), output_type="latent",
    ).frames.float()  # fmt: skip


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference over the largest of `b`; infinite where a is not finite."""
    return float((a - b).abs().max() / b.abs().max()) if bool(a.isfinite().all()) else float("inf")


# ---- the cells ----------------------------------------------------------------------------------------------------------------------------


def outcome(bench: Bench, row: Row, column: str, order: str, plan: str) -> torch.Tensor | str:
    """The video of one combination, or the message by which it is refused."""
    try:
        if order == "before":
            pipe = bench.enable(row.treat(bench, bench.pipe()), column, plan)
        else:
            pipe = row.treat(bench, bench.enable(bench.pipe(), column, plan))
        return video(pipe)
    except REFUSALS as error:
        return str(error).splitlines()[0]


@contextmanager
def said_by_usv():
    """A list that fills with the messages of usv's logger."""
    heard, handler = [], logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    logging.getLogger("usv").addHandler(handler)
    try:
        yield heard
    finally:
        logging.getLogger("usv").removeHandler(handler)


def base_of(row: Row, column: str, order: str) -> bool:
    """Whether what runs at half of the blocks is something else in this order, as the page says: a base, or the student untouched."""
    return row.said(column, order) in ("what is saved is the dense base, said so", "a pattern is not saved")


def cell(bench: Bench, row: Row, column: str) -> str:
    """A cell of the page. AssertionError, which says what was found, where it is wrong."""
    parts, sparse = {}, {}
    for order in row.orders:
        with said_by_usv() as heard:
            found = outcome(bench, row, column, order, "whole")
        assert heard or "so" not in row.said(column, order).split(), f"{row.name}, {column}, {order}: nothing was said"
        if isinstance(found, str):
            assert ", accepted" in found or "accepted:" in found, f"{row.name}, {column}, {order}: no refusal by name: {found}"
            parts[order] = f"refused: {refusal(found.replace(f'{bench.folder}/', ''))}"
            continue
        few = column == COLUMNS[1]
        untouched = row.said(column, order).startswith("the student's own")
        wanted = bench.dense(UNTREATED if untouched else row, few and not base_of(row, column, order))
        away = distance(found, wanted)
        assert away <= row.bound, f"WRONG: {row.name}, {column}, {order}, every block kept: {away:.2g} from the dense pipeline, accepted: {row.bound:g}"
        if not base_of(row, column, order):
            sparse[order] = outcome(bench, row, column, order, "sparse")
        parts[order] = "; ".join(filter(None, (f"same ({row.bound:.0e})", row.said(column, order))))
    check_sparse(bench, row, column, sparse)
    if len(set(parts.values())) == 1:
        return next(iter(parts.values()))
    return "; ".join(f"*{order}* {text}" for order, text in parts.items())


def check_sparse(bench: Bench, row: Row, column: str, sparse: dict) -> None:
    """At half of the blocks: both orders alike, or as without where nothing is to change."""
    plain = bench.plain(column)
    for order, found in sparse.items():
        where = f"WRONG: {row.name}, {column}, {order}, half of the blocks"
        assert not isinstance(found, str), f"{where}: refused with {found}"
        if row.moves:
            assert (away := distance(found, plain)) <= row.bound, f"{where}: {away:.2g} from the pipeline without"
        elif not row.said(column, order):
            assert distance(found, plain) > 0, f"{where}: nothing changed"
    if set(sparse) == {"before", "after"} and not any(row.said(column, order) for order in sparse):
        assert (away := distance(sparse["before"], sparse["after"])) <= 2 * row.bound, f"WRONG: {row.name}, {column}: the orders differ by {away:.2g}"


def refusal(message: str) -> str:
    return message if len(message) < 160 else message[:157] + "…"


def missing(row: Row) -> str | None:
    """Why a row cannot be run here."""
    if row.needs == "bitsandbytes" and not torch.cuda.is_available():
        return "not run: needs a GPU"
    return f"not run: {row.needs} is not installed" if row.needs is not None and importlib.util.find_spec(row.needs) is None else None


TEXT = """# Together

What else is done to a pipeline, before `usv.enable` and after: the output of `python tests/together.py` with {packages}.

Every cell is run on a tiny random Wan, on a CPU, in fp32. Two things are compared: with every block kept, the enabled pipeline with the dense one
that was treated likewise; at half of the blocks, the pipeline that was treated first with that treated after, and where the treatment changes no
numbers with the one that was not treated. *same (b)*: the largest difference over the largest latent is at most b, in either order. *refused*: the message.
Anything else is an error of the command. `tests/test_together.py` runs the rows in upright letters and holds the page; those in
italics compile or need a package that CI has not, or repeat another test.

`usv.disable` gives back what there was: the pipeline's own transformer with the adapters that it had before `usv.enable`. What was fused and
unloaded since, stays with the student. Several processes: `torchrun infer.py` ([scaling](scaling.md)), tested in `tests/sampling/test_crew.py`. Compiled blocks
(`pipe.transformer.compile_repeated_blocks(fullgraph=True)` after `enable`) are a graph for each kind of layer, dense, sparse and merged; another budget or another scale of a LoRA compiles nothing anew.
A student's folder and file know the base it was trained from: another model of the same shapes is refused in a line.

"""


def router_section() -> str:
    """What a router loses and keeps on Wan-mini, from the results of tests/router.py; nothing where there are none."""
    if not ROUTER.is_file():
        return ""
    report = json.loads(ROUTER.read_text())
    error, about = report["error"], report["plan"]
    lines = [
        "", "## A router on Wan-mini", "",
        f"Only gates trained (`experiment=usv_router`, a uniform plan, {about['steps'][0]} steps), beside all weights trained on the same plan (density {about['density']:.2f}, {about['merged']:.0%} merged) from there, "
        f"{about['steps'][1]} steps towards the same velocities. Held-out error ‖student − teacher‖² / ‖teacher‖² of {report['clips']} clips in every timestep bin "
        f"([figures](../data/results/router_wan_mini.json), `{report['command']}`):", "",
        "| | error |", "|---|---|",
        f"| the plan, nothing trained | {error['untrained']:.4f} |", f"| router | {error['router']:.4f} |", f"| all weights | {error['full']:.4f} |",
    ]  # fmt: skip
    if report["int8_over_fp32"] is not None:
        lines += [f"| the router's gates on an int8 copy of the base | {error['router_int8']:.4f} |", f"| the int8 copy, dense | {error['dense_int8']:.4f} |"]
    lines += ["", f"Router over all weights: {report['router_over_full']:.2f} (aim: 1.3)." + ("" if report["int8_over_fp32"] is None else f" On int8 over fp32: {report['int8_over_fp32']:.3f} (aim: 1.05).")]
    if "style" not in report:
        return "\n".join([*lines, "", "A style beside it was not measured in this run."]) + "\n"
    names = {"router": "router", "full": "all weights", "few_step": "few-step student"}
    lines += ["", "What a style (a LoRA of rank 8 that makes clips sepia, trained on the base) changes in the velocity, beside what it changes in the dense model's at the same points (aim for a router: a cosine of 0.98):", "", "| | cosine | length |", "|---|---|---|"]
    lines += [f"| {names[name]} | {row['cosine']:.3f} | {row['length']:.2f} |" for name, row in report["style"].items()]
    if "style_videos" in report:
        lines += ["", f"and in {report['videos']} videos: how much of the colours lies beside sepia's without it and with it, and how near the styled video is to the other one made sepia:", "", "| | steps | off tint | styled | PSNR |", "|---|---|---|---|---|"]
        lines += [f"| {names.get(name, name)} | {row['steps']} | {row['off_tint']:.3f} | {row['off_tint_styled']:.3f} | {row['psnr_to_sepia_of_unstyled']:.1f} |" for name, row in report["style_videos"].items()]
    return "\n".join(lines) + "\n"


def page(bench: Bench, rows: tuple[Row, ...] = ROWS) -> str:
    """docs/together.md."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("diffusers", "peft", "accelerate", "torch", "torchao", "gguf") if importlib.util.find_spec(name))
    lines = [f"| done before or after `usv.enable` | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for row in rows:
        cells = [missing(row) or cell(bench, row, column) for column in COLUMNS]
        lines.append(line(row, cells))
    return TEXT.format(packages=packages) + "\n".join(lines) + "\n" + router_section()


def line(row: Row, cells: list[str]) -> str:
    return f"| {row.name if row.quick else f'*{row.name}*'} | {' | '.join(cells)} |"


def main() -> None:
    os.environ.setdefault("TRITON_INTERPRET", "1")
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):  # others write to it, too
        found = page(Bench(Path(folder)))
    print(found, end="")


if __name__ == "__main__":
    sys.exit(main())
