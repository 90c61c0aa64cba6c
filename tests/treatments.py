"""The rows of docs/together.md: what is done to a pipeline, and what is to be said of it beside "same"."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import accelerate
import lora_files
import torch
from diffusers import (
    ContextParallelConfig,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    GGUFQuantizationConfig,
    WanPipeline,
    WanTransformer3DModel,
)

from usv.sampling.enable import Enabled
from usv.sampling.generate import load_pipeline, single_precision_rope
from usv.sampling.wan_file import wan_name

CPU = torch.device("cpu")
COLUMNS = ("student", "few-step student", "router's student", "pattern")
Treatment = Callable[[object, WanPipeline], WanPipeline]  # of a `together.Bench` and a pipeline
FP32 = 1e-5  # rounding of another order of sums


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
    treat: Treatment
    bound: float = FP32
    moves: bool = True
    quick: bool = True
    needs: str | None = None
    orders: tuple[str, ...] = ("before", "after")
    said: Callable[[str, str], str] = lambda column, order: ""


def on(action: Callable) -> Treatment:
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


def styled(kind: str, action: str) -> Treatment:
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
    Row("LoRA lora_unet, fp8 weights", styled_fp8, moves=False, quick=False, needs="torchao"),
    Row("GGUF Q8_0 base", gguf, moves=False, quick=False, needs="gguf", orders=("before",)),
    Row("bitsandbytes int8 weights", on(bnb), 0.05, moves=False, quick=False, needs="bitsandbytes"),
)


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe
