"""A trained student as a folder that stock diffusers loads:

    python -m usv.export --ckpt outputs/usv_wan/student --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --out exported
    python -m usv.export --ckpt outputs/usv_wan/student --model … --out exported_lora --lora
    python -m usv.export --ckpt outputs/usv_wan/student --model … --out student.safetensors --comfyui       one file (comfyui.py)

    exported/        WanPipeline.from_pretrained(exported), or what its family's is called, then usv.enable(pipe, exported)
      transformer/ vae/ text_encoder/ …     plain diffusers; the student's weights, adapters merged
      usv/config.json                       plan, policy tables, tile, sampler;  usv/student.safetensors  the coarse gates
    exported_lora/   pipe.load_lora_weights(exported_lora); pipe.fuse_lora(); pipe.unload_lora_weights(); usv.enable(pipe, exported_lora)
      pytorch_lora_weights.safetensors      the student's own adapters, or with --rank the best low-rank part of its update
      usv/…                                 as above

--out names a folder that is new or empty; --overwrite replaces an earlier export, and nothing else.

Without usv.enable both run the student's weights densely. A LoRA cut from a fully trained student is an approximation; how much
of the update it holds is printed and kept in usv/config.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from usv.config import SettingError
from usv.files import FileError, atomic_folder, check_folder, checksum
from usv.models import lora
from usv.sampling.checkpoint import (
    CheckpointError,
    Student,
    load_student,
    read_config,
    record_of,
)
from usv.sampling.comfyui import check_wan, write_lora, write_weights
from usv.sampling.fingerprint import fingerprint
from usv.sampling.generate import load_pipeline
from usv.sampling.record import pipeline_class, pipeline_index

PARTS = {"usv", "model_index.json", "pytorch_lora_weights.safetensors"}  # of an export, beside the parts of its pipeline


def parts_of(folder: Path) -> set[str]:
    """What an export in `folder` is made of: with anything else in it a folder is not replaced."""
    return PARTS | set(pipeline_index(folder))


def check_out(out: str | Path, overwrite: bool) -> Path:
    """The folder to write, as it is called without links. FileError where something else than an export stands there, or one may not
    be replaced."""
    path = Path(out)
    if not str(out) or path == Path("."):
        raise FileError(f"--out: got {str(out)!r}, accepted: the name of a new folder")
    path = path.resolve()
    if path.exists() and not path.is_dir():
        raise FileError(f"--out: got {out}, which is a file, accepted: the name of a new folder")
    names, parts = {entry.name for entry in path.iterdir()} if path.exists() else set(), parts_of(path)
    if names and (not names <= parts or not (path / "usv" / "config.json").is_file()):
        other = ", ".join(sorted(names - parts)[:3]) or "no usv/config.json"
        raise FileError(f"--out: got {out}, which is not empty and no export of this program ({other}), accepted: a new or an empty folder")
    if names and not overwrite:
        raise FileError(f"--out: got {out}, where an export stands; --overwrite replaces it, or give a new folder")
    check_folder(path.parent)
    return path


def write_usv(folder: Path, student: Student, transformer, **more) -> None:
    """usv/: everything of the student that a diffusers folder has no place for."""
    folder.mkdir()
    gates = {n: v.detach().cpu().contiguous() for n, v in student.model.state_dict().items() if n.startswith("gates.")}
    save_file(gates, folder / "student.safetensors")
    weights = {"checksum": checksum(folder / "student.safetensors")}
    record = {**record_of(student), "fingerprint": fingerprint(transformer), **weights, **more}
    (folder / "config.json").write_text(json.dumps(record, indent=1))


def refuse_expert(ckpt: str | Path) -> None:
    """CheckpointError for a student of one of two experts, and for what is no student."""
    if expert := read_config(ckpt)["sampling"].get("expert"):
        raise CheckpointError(f"{ckpt}: a student of one of two experts ({expert}) is not exported; usv.enable(pipe, (HIGH, LOW)) runs both")


def export(ckpt: str | Path, model: str, out: Path, dtype: torch.dtype | None = None, overwrite: bool = False) -> Path:
    """A whole pipeline folder with the student's weights. Raises CheckpointError, SettingError, OSError.

    dtype: of the transformer's weights; None keeps fp32. overwrite: an earlier export in `out` is replaced.
    """
    refuse_expert(ckpt)
    place = check_out(out, overwrite)
    pipe = load_pipeline(model, kind=DiffusionPipeline)
    student = load_student(ckpt, pipe.transformer)
    pipe.transformer = student.model.transformer
    if dtype is not None:
        pipe.transformer.to(dtype)

    def write(folder: Path) -> None:
        pipe.save_pretrained(folder)
        write_usv(folder / "usv", student, pipe.transformer)

    atomic_folder(place, write)
    return out


def export_file(ckpt: str | Path, model: str, out: str | Path, dtype: torch.dtype | None = None, overwrite: bool = False) -> str | None:
    """One safetensors file under Wan's own names (usv/sampling/comfyui.py); what ComfyUI could not do with it, or None.

    dtype: of the weights, but for those that diffusers keeps in fp32; None keeps fp32. Raises CheckpointError, SettingError, OSError.
    """
    refuse_expert(ckpt)
    place = check_file(out, overwrite)
    pipe = load_pipeline(model, kind=DiffusionPipeline)
    student = load_student(ckpt, pipe.transformer)
    if dtype is not None:
        cast(student.model.transformer, dtype)
    write_weights(student, pipe.transformer, place)
    return check_wan(pipe.transformer)


def check_file(out: str | Path, overwrite: bool) -> Path:
    """The file to write. FileError where it has another ending, or stands already and may not be replaced."""
    path = Path(out)
    if path.suffix != ".safetensors":
        raise FileError(f"--out: got {out} with --comfyui, accepted: the name of a file that ends in .safetensors")
    if path.exists() and not overwrite:
        raise FileError(f"--out: got {out}, which stands already; --overwrite replaces it, or give another name")
    return path


def cast(transformer, dtype: torch.dtype) -> None:
    """The transformer's weights in `dtype`, but for the modules that diffusers keeps in fp32 when it loads them so."""
    kept = tuple(getattr(transformer, "_keep_in_fp32_modules", None) or ())
    for name, parameter in transformer.named_parameters():
        if not any(part in name for part in kept):
            parameter.data = parameter.data.to(dtype)


def export_lora(ckpt: str | Path, model: str, out: Path, rank: int | None = None, overwrite: bool = False, comfyui: bool = False) -> float:
    """A diffusers LoRA folder; returns the share of the update's squared norm that it holds (1 for a student of adapters).

    rank: for a student without adapters, of the LoRA that is cut from its update. overwrite: an earlier export in `out` is replaced.
    comfyui: one file under Wan's own names instead of a folder.
    """
    refuse_expert(ckpt)
    record = read_config(ckpt)
    own = (record.get("lora") or {}).get("rank")
    if rank is not None and rank < 1:
        raise SettingError(f"--rank: got {rank}, accepted: at least 1, e.g. --rank 64")
    if None not in (own, rank) and own != rank:
        raise SettingError(f"--rank: got {rank} for a student of adapters of rank {own}, accepted: none, which exports them as they are")
    place = check_file(out, overwrite) if comfyui else check_out(out, overwrite)
    pipe = load_pipeline(model, kind=DiffusionPipeline)
    if not hasattr(pipe, "load_lora_weights"):
        raise SettingError(f"--lora: got a {type(pipe).__name__}, which loads no LoRA, accepted: neither --lora nor --rank, which writes a whole pipeline")
    student, base = load_student(ckpt, pipe.transformer), fingerprint(pipe.transformer)
    if record.get("lora"):
        tensors = {n: v for n, v in load_file(Path(ckpt) / "student.safetensors").items() if lora.is_adapter(n)}
        alpha, rank, held = record["lora"]["alpha"], record["lora"]["rank"], 1.0
    elif rank is None:
        raise SettingError(
            "--rank: got none, and this student has no adapters; accepted: the rank of the LoRA to cut, e.g. --rank 64"
        )
    else:
        blocks, block = student.model.family.layers(student.model.transformer)[0]
        widest = min(blocks.attention(block).to_q.weight.shape)
        if rank > widest:
            raise SettingError(f"--rank: got {rank}, accepted: 1 to {widest}, the smaller side of a query projection")
        tensors, held = cut(pipe.transformer.state_dict(), student.model.transformer.state_dict(), lora.layers_of(pipe.transformer, lora.PROJECTIONS), rank)
        alpha = rank
    scale = alpha / rank
    if scale != 1.0:  # written into B, so that no reader needs to know alpha
        tensors = {n: v * scale if ".lora_B." in n else v for n, v in tensors.items()}
    state = {n.removeprefix("transformer."): v for n, v in pipe.transformer.state_dict().items()}
    fused = lora.merged(
        {**state, **lora.from_diffusers_names({n.removeprefix("transformer."): v for n, v in tensors.items()})}, 1.0
    )
    pipe.transformer.load_state_dict(fused)
    if comfyui:
        write_lora(student, base, tensors, pipe.transformer, place)
        return held

    def write(folder: Path) -> None:
        save_file({n: v.contiguous() for n, v in tensors.items()}, folder / "pytorch_lora_weights.safetensors")
        write_usv(folder / "usv", student, pipe.transformer, lora_holds=held)

    atomic_folder(place, write)
    return held


def cut(base: dict, trained: dict, layers: Sequence[str], rank: int) -> tuple[dict[str, torch.Tensor], float]:
    """The best rank-`rank` part of the update of every one of `layers`, as diffusers LoRA tensors, and the share of ‖update‖² it holds.

    The share counts all weights of the transformer: what changed outside the layers is lost.
    """
    tensors, kept, total = {}, 0.0, 0.0
    weights = {f"{layer}.weight" for layer in layers}
    for name, before in base.items():
        update = trained[name].float() - before.float()
        total += float(update.square().sum())
        if name not in weights:
            continue
        layer = name.removesuffix(".weight")
        u, s, v = torch.linalg.svd(update, full_matrices=False)
        root = s[:rank].sqrt()
        tensors[f"transformer.{layer}.lora_A.weight"] = root[:, None] * v[:rank]
        tensors[f"transformer.{layer}.lora_B.weight"] = u[:, :rank] * root
        kept += float(s[:rank].square().sum())
    return tensors, kept / total if total else 1.0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True, help="a student folder of train.py")
    parser.add_argument("--model", default="data/wan-mini", help="the model it was trained from: folder or hub id")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the transformer"
    )
    parser.add_argument("--lora", action="store_true", help="write a diffusers LoRA instead of a whole pipeline")
    parser.add_argument("--comfyui", action="store_true", help="write one file under Wan's own names, which ComfyUI's loaders read")
    parser.add_argument("--rank", type=int, help="with --lora, for a fully trained student")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export in --out")
    args = parser.parse_args(argv)
    try:
        if args.rank is not None and not args.lora:
            raise SettingError(f"--rank: got {args.rank} without --lora, accepted: --lora --rank {args.rank}, or neither")
        if args.comfyui:
            if args.lora:
                held = export_lora(args.ckpt, args.model, args.out, args.rank, args.overwrite, comfyui=True)
                print(f"{args.out}: a LoRA that holds {held:.1%} of the update, under the names ComfyUI's LoRA loader reads")
            elif said := export_file(args.ckpt, args.model, args.out, getattr(torch, args.dtype), args.overwrite):
                print(f"note: {said}")
            else:
                print(f"{args.out}: put it into ComfyUI's models/diffusion_models; by its plan with the node USV Student (integrations/comfyui), else densely")
            if not args.lora:
                print(f"here: usv.enable(pipe, {args.out!r})")
        elif args.lora:
            held = export_lora(args.ckpt, args.model, args.out, args.rank, args.overwrite)
            print(f"{args.out}: a LoRA that holds {held:.1%} of the update. pipe.load_lora_weights({str(args.out)!r}); "
                  f"pipe.fuse_lora(); pipe.unload_lora_weights(); usv.enable(pipe, {str(args.out)!r})")  # fmt: skip
        else:
            export(args.ckpt, args.model, args.out, getattr(torch, args.dtype), args.overwrite)
            print(f"{args.out}: pipe = {pipeline_class(args.out)}.from_pretrained({str(args.out)!r}); usv.enable(pipe, {str(args.out)!r})")
    except (ValueError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0
