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
import re
import tempfile
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save, save_file

from usv.files import check_output, replacing
from usv.sampling.checkpoint import FORMAT, CheckpointError, Student, fingerprint, record_of

# diffusers' name -> Wan's, longest first where one is part of another; the two norms around cross-attention change places
_NAMES = (
    ("condition_embedder.time_embedder.linear_1.", "time_embedding.0."),
    ("condition_embedder.time_embedder.linear_2.", "time_embedding.2."),
    ("condition_embedder.text_embedder.linear_1.", "text_embedding.0."),
    ("condition_embedder.text_embedder.linear_2.", "text_embedding.2."),
    ("condition_embedder.time_proj.", "time_projection.1."),
    ("condition_embedder.image_embedder.norm1.", "img_emb.proj.0."),
    ("condition_embedder.image_embedder.ff.net.0.proj.", "img_emb.proj.1."),
    ("condition_embedder.image_embedder.ff.net.2.", "img_emb.proj.3."),
    ("condition_embedder.image_embedder.norm2.", "img_emb.proj.4."),
    ("condition_embedder.image_embedder.pos_embed", "img_emb.emb_pos"),
    ("proj_out.", "head.head."),
    ("scale_shift_table", "head.modulation"),
)
_BLOCK_NAMES = (
    ("scale_shift_table", "modulation"), ("attn1.", "self_attn."), ("attn2.", "cross_attn."), ("ffn.net.0.proj.", "ffn.0."),
    ("ffn.net.2.", "ffn.2."), ("norm2.", "norm3."), ("proj_in.", "before_proj."), ("proj_out.", "after_proj."),
)  # fmt: skip
_ATTENTION_NAMES = (
    ("to_q.", "q."), ("to_k.", "k."), ("to_v.", "v."), ("to_out.0.", "o."), ("add_k_proj.", "k_img."), ("add_v_proj.", "v_img."),
    ("norm_added_k.", "norm_k_img."),
)  # fmt: skip
_BLOCK = re.compile(r"(blocks|vace_blocks)\.(\d+)\.(.*)")
HEAD_WIDTH = 128  # ComfyUI counts a Wan model's heads by it


def _renamed(name: str, pairs: tuple[tuple[str, str], ...], back: bool) -> str:
    for ours, wans in pairs:
        old, new = (wans, ours) if back else (ours, wans)
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def wan_name(name: str, back: bool = False) -> str:
    """A parameter of diffusers' WanTransformer3DModel under Wan's own name, `back` the other way; LoRA endings stay."""
    found = _BLOCK.fullmatch(name)
    if found is None:
        return _renamed(name, _NAMES, back)
    blocks, index, rest = found.groups()
    rest = _renamed(rest, _BLOCK_NAMES, back)
    part, _, inner = rest.partition(".")
    if part in ("attn1", "attn2", "self_attn", "cross_attn"):
        rest = f"{part}.{_renamed(inner, _ATTENTION_NAMES, back)}"
    return f"{blocks}.{index}.{rest}"


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
    if type(transformer).__mro__[0].__name__ != "WanTransformer3DModel" and not any(c.__name__ == "WanTransformer3DModel" for c in type(transformer).__mro__):
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


def read(path: str | Path) -> tuple[dict, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(record, gates, tensors by diffusers' names) of such a file. CheckpointError where it is damaged, or of somebody else."""
    path = Path(path)
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if "usv" not in metadata:
                raise CheckpointError(f"{path}: no student (its metadata have no entry usv); give a file of python -m usv.export --comfyui, or a folder of train.py")
            record, gates = json.loads(metadata["usv"]), load(base64.b64decode(metadata["usv_gates"]))
            tensors = {wan_name(name.removeprefix("diffusion_model."), back=True): file.get_tensor(name) for name in file.keys()}
    except CheckpointError:
        raise
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: not readable as a student ({str(error)[:200]}); the file is damaged, use another") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format {record.get('format') if isinstance(record, dict) else record!r}, expected {FORMAT!r}; write it again with this version")
    return record, gates, tensors


def unpack(path: str | Path, folder: Path) -> Path:
    """The file as a student folder, which `load_student` reads. CheckpointError as `read`."""
    record, gates, tensors = read(path)
    if not record.pop("adapters", False):  # the weights are here; of adapters they are the pipeline's, with the file fused in
        record.pop("fingerprint", None)
        gates |= {f"transformer.{name}": value for name, value in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(gates, folder / "student.safetensors")
    (folder / "config.json").write_text(json.dumps(record, indent=1))
    return folder


def load_file_student(path: str | Path, base: torch.nn.Module) -> Student:
    """The student of such a file beside its model. CheckpointError as `load_student`."""
    from usv.sampling.checkpoint import load_student

    with tempfile.TemporaryDirectory() as folder:
        try:
            return load_student(unpack(path, Path(folder)), base)
        except CheckpointError as error:
            raise CheckpointError(str(error).replace(folder, str(path))) from None
