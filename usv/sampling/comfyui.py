"""A student of a Wan model as one safetensors file under Wan's own names, which ComfyUI's loaders read; and back.

    python -m usv.export --ckpt outputs/usv_wan/student --model … --out student.safetensors --comfyui           all weights
    python -m usv.export --ckpt outputs/usv_wan/student --model … --out student.safetensors --comfyui --lora    its adapters

The tensors are those ComfyUI expects of Wan and no others (integrations/comfyui/wan_keys.json). What makes them a student, plan,
gates, steps, shift, sizes, tile, the base it belongs to and who wrote it, lies in the file's metadata under "usv": a loader that does
not know it runs the weights densely, and `usv.enable(pipe, "student.safetensors")` runs the student.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from safetensors.torch import save, save_file

from usv.files import check_output, replacing
from usv.sampling.checkpoint import CheckpointError, Student, record_of
from usv.sampling.fingerprint import fingerprint
from usv.sampling.wan_file import wan_name

HEAD_WIDTH = 128  # ComfyUI counts a Wan model's heads by it


def _metadata(student: Student, base: Mapping[str, list[float]], **more) -> dict[str, str]:
    gates = {n: v.detach().cpu().contiguous() for n, v in student.model.state_dict().items() if n.startswith("gates.")}
    try:
        own = version("usv")
    except PackageNotFoundError:
        own = "unknown"
    record = {**record_of(student), "base": base, "version": own, **more}
    return {"format": "pt", "usv": json.dumps(record), "usv_gates": base64.b64encode(save(gates)).decode()}


def check_wan(transformer: torch.nn.Module) -> str | None:
    """None where ComfyUI's own model detection makes this transformer of the file; else what it would get wrong, in a sentence.

    CheckpointError for a transformer of another family, which has no Wan names.
    """
    if not any(c.__name__ == "WanTransformer3DModel" for c in type(transformer).__mro__):
        raise CheckpointError(f"--comfyui: got a {type(transformer).__name__}, accepted: a student of a Wan transformer")
    config = transformer.config
    if config.attention_head_dim != HEAD_WIDTH or config.freq_dim != 256:
        return (
            f"ComfyUI takes every Wan model for one of heads of {HEAD_WIDTH} channels and 256 frequencies; this one has "
            f"{config.attention_head_dim} and {config.freq_dim}, so ComfyUI cannot run it"
        )
    return None


def _write(out: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    check_output(out, begins=None)
    with replacing(out) as temporary:
        save_file({name: value.contiguous() for name, value in tensors.items()}, temporary, metadata)
        temporary.chmod(0o644)


def write_weights(student: Student, base: torch.nn.Module, out: Path) -> None:
    """All weights of `student`, in the dtypes they have, and its metadata. base: the model it was trained from. CheckpointError, OSError."""
    check_wan(base)
    state = {n.removeprefix("transformer."): v.detach().cpu() for n, v in student.model.state_dict().items() if n.startswith("transformer.")}
    _write(out, {wan_name(name): value for name, value in state.items()}, _metadata(student, fingerprint(base)))


def write_lora(student: Student, base: Mapping[str, list[float]], tensors: Mapping[str, torch.Tensor], fused: torch.nn.Module, out: Path) -> None:
    """Adapters, as `usv.sampling.export` names them (transformer.….lora_A.weight), and the student's metadata.

    base: `fingerprint` of the model the adapters belong to; fused: it with them merged in, by which the student knows its pipeline.
    """
    check_wan(fused)
    named = {f"diffusion_model.{wan_name(n.removeprefix('transformer.'))}": v.detach().cpu() for n, v in tensors.items()}
    _write(out, named, _metadata(student, base, fingerprint=fingerprint(fused), adapters=True))
