"""What else is done to a pipeline, before `usv.enable` and after: python tests/together.py > docs/together.md"""

from __future__ import annotations

import copy
import functools
import importlib.util
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import accelerate
import lora_files
import tiny
import torch
from diffusers import (
    ContextParallelConfig,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    GGUFQuantizationConfig,
    WanPipeline,
    WanTransformer3DModel,
)

import usv
from usv.models.forward import SparseTransformer
from usv.sampling.checkpoint import CheckpointError, Student, save_student
from usv.sampling.enable import Enabled
from usv.sampling.generate import load_pipeline, single_precision_rope
from usv.sampling.sampler import StudentScheduler
from usv.sampling.wan_file import wan_name
from usv.sparse.grid import Tile
from usv.sparse.plan import Rung, SparsityPlan, timestep_bins

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
SAMPLING = {"height": tiny.SIZE, "width": tiny.SIZE, "num_frames": tiny.FRAMES, "num_inference_steps": 2, "max_sequence_length": tiny.TEXT, "flow_shift": 3.0}
STEPS = [1000.0, 400.0]
WHOLE = SparsityPlan(timestep_bins(2, 3.0), ((Rung(), Rung()),) * 2)
SPARSE = SparsityPlan(timestep_bins(2, 3.0), ((Rung(1, 0), Rung(2, 2)), (Rung(), Rung(1, 1))))
COLUMNS = ("student", "few-step student", "router's student", "pattern")
FP32 = 1e-5  # rounding of another order of sums
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


# ---- the rows -----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """Something done to a pipeline.

    Attributes:
        name: as the page has it.
        treat: (bench, pipe) -> the pipeline that then runs.
        bound: of the differences.
        moves: whether it changes no numbers.
        quick: whether tests/test_together.py runs it.
        needs: a package without which the row is not run.
        orders: when it is done.
        said: (column, order) -> what is true of the cell beside "same", in words.
    """

    name: str
    treat: Callable[[Bench, WanPipeline], WanPipeline]
    bound: float = FP32
    moves: bool = True
    quick: bool = True
    needs: str | None = None
    orders: tuple[str, ...] = ("before", "after")
    said: Callable[[str, str], str] = lambda column, order: ""


def on(action: Callable) -> Callable[[Bench, WanPipeline], WanPipeline]:
    """A treatment that changes the pipeline it is given."""

    def treat(bench, pipe):
        action(pipe)
        return pipe

    return treat


def sequential(pipe) -> None:
    """What enable_sequential_cpu_offload does, which without a GPU leaves no parameters."""

    def put_on(device=None):
        pipe._offload_device = CPU
        accelerate.cpu_offload(pipe.transformer, CPU)

    pipe.enable_sequential_cpu_offload = put_on
    put_on()


def compiled(pipe) -> None:
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")


def saved(bench, pipe) -> WanPipeline:
    with tempfile.TemporaryDirectory() as folder:
        pipe.save_pretrained(folder)
        again = load_pipeline(folder)
    return again


def swapped(pipe) -> None:
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)


def spread(pipe) -> None:
    """enable_parallelism, which without processes leaves only its mark."""
    if isinstance(getattr(pipe, "_usv", None), Enabled):
        pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    pipe.transformer._parallel_config = SimpleNamespace(context_parallel_config=ContextParallelConfig(ulysses_degree=2))


def int8(pipe) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(pipe.transformer, Int8WeightOnlyConfig())


def fp8(pipe) -> None:
    from torchao.quantization import Float8WeightOnlyConfig, quantize_

    quantize_(pipe.transformer, Float8WeightOnlyConfig())


def gguf(bench, pipe) -> WanPipeline:
    """The transformer from a GGUF file, blocks in Q8_0."""
    import gguf as format

    file = bench.folder / "wan.gguf"
    if not file.exists():
        writer, q8 = format.GGUFWriter(str(file), "wan"), format.GGMLQuantizationType.Q8_0
        for name, tensor in bench.loaded.transformer.state_dict().items():
            if tensor.ndim == 2 and tensor.shape[-1] % 32 == 0 and name.startswith("blocks"):
                writer.add_tensor(wan_name(name), format.quants.quantize(tensor.numpy(), q8), raw_dtype=q8)
            else:
                writer.add_tensor(wan_name(name), tensor.numpy())
        writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    settings = {"quantization_config": GGUFQuantizationConfig(compute_dtype=torch.float32), "config": str(bench.folder / "wan"), "subfolder": "transformer"}
    pipe.transformer = WanTransformer3DModel.from_single_file(str(file), torch_dtype=torch.float32, **settings)
    single_precision_rope(pipe.transformer)
    return pipe


def bnb(pipe) -> None:
    import bitsandbytes

    for module in list(pipe.transformer.blocks.modules()):
        for name, layer in list(module.named_children()):
            if type(layer) is torch.nn.Linear:
                new = bitsandbytes.nn.Linear8bitLt(layer.in_features, layer.out_features, layer.bias is not None, has_fp16_weights=False)
                new.load_state_dict(layer.state_dict())
                setattr(module, name, new)
    pipe.to("cuda")


def styled(kind: str, action: str) -> Callable[[Bench, WanPipeline], WanPipeline]:
    def treat(bench, pipe):
        pipe.load_lora_weights(lora_files.FORMATS[kind](bench.update), adapter_name="style")
        if action == "scale":
            pipe.set_adapters("style", 0.5)
        elif action == "fuse":
            pipe.fuse_lora(lora_scale=0.7)
        elif action == "unload":
            pipe.unload_lora_weights()
        elif action == "fuse, unload":
            pipe.fuse_lora()
            pipe.unload_lora_weights()
        return pipe

    return treat


def styled_fp8(bench, pipe) -> WanPipeline:
    fp8(pipe)
    return styled("lora_unet", "scale")(bench, pipe)


def gates_too(column: str, order: str) -> str:
    return "its gates are quantised with it" if column == "router's student" and order == "after" else ""


def uncompiled(column: str, order: str) -> str:
    return "" if column == "pattern" or order == "after" else "the student runs uncompiled, and says so"


def base_saved(column: str, order: str) -> str:
    return "what is saved is the dense base, said so" if order == "after" and column != "pattern" else "a pattern is not saved" if order == "after" else ""


UNTREATED = Row("nothing", lambda bench, pipe: pipe)
ROWS = (
    Row("model offload", on(lambda pipe: pipe.enable_model_cpu_offload(device="cpu"))),
    Row("sequential offload", on(sequential)),
    Row("group offload, by block", on(lambda pipe: pipe.transformer.enable_group_offload(CPU, CPU, "block_level", num_blocks_per_group=1))),
    Row("group offload, by leaf", on(lambda pipe: pipe.transformer.enable_group_offload(CPU, CPU, "leaf_level"))),
    Row("`.to(torch.bfloat16)`", on(lambda pipe: pipe.transformer.to(torch.bfloat16)), 2**-7, moves=False),
    Row("layerwise casting to fp8", on(lambda pipe: pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)), moves=False),
    Row("`deepcopy`", lambda bench, pipe: copy.deepcopy(pipe)),
    Row("`from_pipe`", lambda bench, pipe: quiet(WanPipeline.from_pipe(pipe)), said=lambda column, order: "the sibling runs it, too" if order == "after" else ""),
    Row("`save_pretrained`, `from_pretrained`", saved, said=base_saved),
    Row("another scheduler (Euler for UniPC)", on(swapped), moves=False, said=lambda column, order: "the student's own replaces it" if order == "before" and column == COLUMNS[1] else ""),
    Row("FirstBlockCache", on(lambda pipe: pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))), moves=False),
    Row("`enable_parallelism`", on(spread)),
    *(
        Row(f"LoRA {kind}, {action}", styled(kind, action), moves=action == "unload", quick=(kind, action) in (("lora_unet", "scale"), ("lightx2v", "fuse"), ("diffusers", "fuse, unload")))
        for kind in lora_files.FORMATS for action in ("scale", "fuse", "unload", "fuse, unload")
    ),
    Row("`compile_repeated_blocks`", on(lambda pipe: pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)), 1e-4, quick=False, said=uncompiled),
    Row("`torch.compile(pipe.transformer)`", on(compiled), 1e-4, quick=False, said=uncompiled),
    Row("torchao int8 weights", on(int8), moves=False, quick=False, needs="torchao", said=gates_too),
    Row("torchao fp8 weights", on(fp8), moves=False, quick=False, needs="torchao", said=gates_too),
    Row("LoRA lora_unet, fp8 weights", styled_fp8, moves=False, quick=False, needs="torchao", orders=("after",)),
    Row("GGUF Q8_0 base", gguf, moves=False, quick=False, needs="gguf", orders=("before",)),
    Row("bitsandbytes int8 weights", on(bnb), 0.05, moves=False, quick=False, needs="bitsandbytes"),
)


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


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
unloaded since, stays with the student.

"""


def page(bench: Bench, rows: tuple[Row, ...] = ROWS) -> str:
    """docs/together.md."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("diffusers", "peft", "accelerate", "torch", "torchao", "gguf") if importlib.util.find_spec(name))
    lines = [f"| done before or after `usv.enable` | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for row in rows:
        cells = [missing(row) or cell(bench, row, column) for column in COLUMNS]
        lines.append(line(row, cells))
    return TEXT.format(packages=packages) + "\n".join(lines) + "\n"


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
