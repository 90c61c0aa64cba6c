"""A student in one safetensors file, read: Wan's own parameter names, and what the file's metadata say of the student.

Written by usv/sampling/comfyui.py, which says what such a file is.
"""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file

from usv.sampling.record import CheckpointError

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
        raise CheckpointError(f"{path}: not readable as a student ({str(error).splitlines()[0][:200]}); the file is damaged, use another") from None
    return record, gates, tensors


def unpack(path: str | Path, folder: Path) -> Path:
    """The file as a student folder, which `load_student` reads. CheckpointError as `read`; the record is not checked here."""
    record, gates, tensors = read(path)
    if not record.pop("adapters", False):  # the weights are here; of adapters they are the pipeline's, with the file fused in
        record.pop("fingerprint", None)
        gates |= {f"transformer.{name}": value for name, value in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(gates, folder / "student.safetensors")
    (folder / "config.json").write_text(json.dumps(record, indent=1))
    return folder
