"""A student in one safetensors file, read: Wan's own parameter names, and what the file's metadata say of the student.

Written by usv/sampling/comfyui.py, which says what such a file is.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load

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


@contextmanager
def _opened(path: str | Path) -> Iterator:
    """The file and what it says of the student. CheckpointError where it is damaged, or of somebody else."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if "usv" not in metadata:
                raise CheckpointError(f"{path}: no student (its metadata have no entry usv); give a file of python -m usv.export --comfyui, or a folder of train.py")
            yield file, metadata
    except CheckpointError:
        raise
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: not readable as a student ({str(error).splitlines()[0][:200]}); the file is damaged, use another") from None


def read_record(path: str | Path):
    """What config.json of a student folder holds; not checked here. CheckpointError as `_opened`."""
    with _opened(path) as (_, metadata):
        return json.loads(metadata["usv"])


def read_gates(path: str | Path) -> dict[str, torch.Tensor]:
    """The coarse gates of the student, by our names. CheckpointError as `_opened`."""
    with _opened(path) as (_, metadata):
        return load(base64.b64decode(metadata["usv_gates"]))


def read_tensors(path: str | Path, record: dict) -> dict[str, torch.Tensor]:
    """What student.safetensors of a folder holds: gates, and the weights by our names; of adapters the gates only, for their weights are
    the pipeline's, with the file fused in. CheckpointError as `_opened`."""
    with _opened(path) as (file, metadata):
        gates = load(base64.b64decode(metadata["usv_gates"]))
        if record.get("adapters"):
            return gates
        return gates | {f"transformer.{wan_name(name, back=True)}": file.get_tensor(name) for name in file.keys()}
