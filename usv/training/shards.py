"""Folders of shards: their index, what fits together and with a model, and the samples in a tar.

A folder of shards is what data/prepare.py writes: tars of `<key>.safetensors` and `<key>.json`, an `index.json` that
names the model the latents belong to, and `empty.safetensors`, the embedding of the empty prompt. It may lie anywhere fsspec
reaches (s3://…, gs://…, https://…): shards are then fetched once, whole, into a local folder.
"""

from __future__ import annotations

import glob
import hashlib
import json
import math
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from usv.training.remote import DataError, Remote, masked

FORMAT = 1
REMEDY = "delete that file and run the same data/prepare.py command again: it rewrites only what is missing"


@dataclass(frozen=True)
class Shard:
    """One tar: its path or URL and how many samples its index promises."""

    path: Path | Remote
    count: int


def named_paths(source) -> list[Path | Remote]:
    """Folders and shards that `source` names, patterns filled in. DataError where one names nothing."""
    entries = [source] if isinstance(source, (str, Path)) else list(source)
    paths: list[Path | Remote] = []
    for entry in entries:
        if "://" in str(entry):
            paths.append(Remote(str(entry).rstrip("/")))
            continue
        found = [Path(entry)] if Path(entry).exists() else [Path(p) for p in sorted(glob.glob(str(entry))) if not _gave_nothing(Path(p))]
        if not found:
            raise DataError(f"{entry}: no such folder or shard; make one with data/prepare.py")
        paths += found
    if not paths:
        raise DataError("no data folder given; name one made by data/prepare.py")
    return paths


def _gave_nothing(path: Path) -> bool:
    """Whether it is the folder of a size of --buckets that no clip was nearest to."""
    return (path / "skipped.jsonl").exists() and not (path / "plan.json").exists() and not (path / "index.json").exists()


def find_shards(source, split: str) -> tuple[list[Shard], dict[Path, dict]]:
    """The shards that `source` names (see ShardDataset) in a fixed order, and the index of every folder they lie in."""
    paths = named_paths(source)
    indices = {}
    shards = []
    for path in paths:
        whole = not path.name.endswith(".tar") if isinstance(path, Remote) else path.is_dir()
        folder = path if whole else path.parent
        index = indices.setdefault(folder, None) or read_index(folder)
        indices[folder] = index
        if whole:
            if split not in index["splits"]:
                raise DataError(f"{folder} has no split {split!r}, only {sorted(index['splits'])}; "
                                "prepare it again with --split")  # fmt: skip
            names = index["splits"][split]["shards"]
        else:
            names = {name: n for part in index["splits"].values() for name, n in part["shards"].items()}
            if path.name not in names:
                raise DataError(f"{path} is not listed in {folder / 'index.json'}; {REMEDY}")
            names = {path.name: names[path.name]}
        shards += [Shard(folder / name, count) for name, count in sorted(names.items()) if count]
    if not shards:
        raise DataError(f"{masked(source)}: no samples in split {split!r}; see skipped.jsonl there for what was left out")
    return shards, indices


def read_index(folder: Path | Remote) -> dict:
    """index.json of one folder. DataError where there is none, or one of another format."""
    path = folder / "index.json"
    if isinstance(path, Path) and not path.exists():
        tars = len(list(folder.glob("*.tar")))
        what = f"{tars} shards but no index.json: preparing was not finished" if tars else "no shards and no index.json"
        raise DataError(f"{folder}: {what}; run data/prepare.py with --out {folder} (finished shards are kept)")
    try:
        index = json.loads(path.read_bytes())
    except DataError:  # a URL that is not reached: nothing there is to be deleted
        raise
    except (ValueError, OSError, RecursionError) as error:
        raise DataError(f"{path} is not readable ({error}); {REMEDY}") from None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        found = index.get("format") if isinstance(index, dict) else type(index).__name__
        raise DataError(f"{path} has format {str(found)[:50]}, this version reads {FORMAT}; prepare the data again")
    if wrong := _odd_entry(index):
        raise DataError(f"{path} is damaged: {wrong}; {REMEDY}")
    return index


def common_form(indices: dict[Path, dict]) -> tuple[tuple[int, ...], int, int | None]:
    """Latent shape, padded text length and text width (None: no text) that all folders share."""
    first, *others = indices
    for name in ("latent_shape", "max_sequence_length", "text_dim", "model"):
        for other in others:
            if indices[first][name] != indices[other][name]:
                raise DataError(f"{first} and {other} cannot be mixed: {name} is {indices[first][name]} in one "
                                f"and {indices[other][name]} in the other; prepare both with the same settings")  # fmt: skip
    index = indices[first]
    return tuple(index["latent_shape"]), index["max_sequence_length"], index["text_dim"]


def _odd_entry(index: dict) -> str | None:
    """What of an index.json cannot be; None where all can. Sizes are bounded: they are asked for before anything is read."""
    whole = lambda value, most: type(value) is int and 0 <= value <= most  # noqa: E731
    shape, splits = index.get("latent_shape"), index.get("splits")
    if not (isinstance(shape, list) and len(shape) == 4 and all(whole(n, 1 << 20) and n for n in shape)):
        return f"latent_shape is {str(shape)[:80]}"
    if not (whole(index.get("max_sequence_length"), 1 << 16) and index["max_sequence_length"]):
        return f"max_sequence_length is {str(index.get('max_sequence_length'))[:80]}"
    if not (index.get("text_dim", 0) is None or whole(index.get("text_dim"), 1 << 20) and index["text_dim"]):
        return f"text_dim is {str(index.get('text_dim', 'missing'))[:80]}"
    if not isinstance(index.get("model"), dict) or not all(v is None or isinstance(v, str) for v in index["model"].values()):
        return f"model is {str(index.get('model'))[:80]}"
    given = index.get("conditions", {})
    shaped = lambda shape: isinstance(shape, list) and 1 <= len(shape) <= 4 and all(whole(n, 1 << 20) and n for n in shape)  # noqa: E731
    if not isinstance(given, dict) or not all(map(shaped, given.values())):
        return f"conditions is {str(given)[:80]}"
    if not isinstance(splits, dict) or not all(isinstance(part, dict) and isinstance(part.get("shards"), dict) for part in splits.values()):
        return f"splits is {str(splits)[:80]}"
    for name, count in ((name, count) for part in splits.values() for name, count in part["shards"].items()):
        if not name.endswith(".tar") or {"/", "\\", "\0"} & set(name) or not whole(count, 1 << 40):
            return f"it names the shard {name[:80]!r} of {str(count)[:20]} samples"
    return None


def asked_conditions(indices: dict[Path, dict], names: Sequence[str]) -> dict[str, list[int]]:
    """Shapes of the conditions of these names, a sample's. DataError where a folder was made without one."""
    for folder, index in indices.items():
        if missing := [name for name in names if name not in index.get("conditions", {})]:
            raise DataError(
                f"{folder} holds no {' and no '.join(missing)}, which this run's model is given beside the text; prepare the clips again with "
                "data/prepare.py --model FOLDER of that model, a WanImageToVideoPipeline"
            )
        shapes = {name: index["conditions"][name] for name in names}
        if shapes != (wanted := {name: next(iter(indices.values()))["conditions"][name] for name in names}):
            raise DataError(f"{next(iter(indices))} and {folder} cannot be mixed: conditions are {wanted} in one and {shapes} in the other; prepare both with the same settings")
    return shapes


def check_use(indices: dict[Path, dict], model: str | Path | None, **wanted) -> None:
    """DataError where a folder was made at other sizes, or for another model, than the run's."""
    words = {
        "latent_shape": ("latents", "the height, width and number of frames of this run"),
        "max_sequence_length": ("captions of at most so many tokens:", "--max-sequence-length of this run, or set model.max_sequence_length"),
        "fps": ("clips of so many frames a second:", "--fps of this run, or set model.fps"),
    }  # fmt: skip
    for folder, index in indices.items():
        if wanted.get("max_sequence_length") is not None and index["text_dim"] is None:
            raise DataError(f"{folder} holds no text embeddings, this run needs them; prepare the clips again with the model's text encoder")
        for name, value in wanted.items():
            found = tuple(index[name]) if isinstance(index.get(name), list) else index.get(name)
            if name == "fps" and isinstance(found, float) and math.isfinite(found) and found != value:
                found = max(1, round(found))  # 23.976 is 24 to a run, which names whole ones
            value = tuple(value) if isinstance(value, list | tuple) else value
            if value is not None and found is not None and found != value:
                raise DataError(f"{folder} holds {words[name][0]} {found}, this run needs {value}; prepare the clips again with {words[name][1]}")
    if model is None:
        return
    used = model_identity(model)
    for folder, index in indices.items():
        _check_model(folder, index, used, model)


def _check_model(folder, index: dict, used: dict, model: str | Path) -> None:
    written = index["model"]
    held = {"vae": True, "text_encoder": index["text_dim"] is not None, "image_encoder": "image_embeds" in index.get("conditions", {})}
    needed = [part for part, value in used.items() if value and held[part]]
    if unsaid := [part for part in needed if not written.get(part)]:
        raise DataError(f"{folder}: its index.json does not say which {' and '.join(unsaid)} it was written with, so they cannot be compared with {model}; "
                        f"prepare the data again with --model {model}")  # fmt: skip
    wrong = [part for part, value in used.items() if value and written.get(part) and value != written[part]]
    if wrong:
        raise DataError(f"{folder} was written for another model: its {' and '.join(wrong)} differ from those in "
                        f"{model}; prepare the data again with --model {model}, or train the model it was made for")  # fmt: skip


def model_identity(folder: str | Path, parts: dict[str, list[str]] | None = None) -> dict[str, str | None]:
    """What latents and embeddings depend on, as hashes: `vae`, `text_encoder` (None where the folder has none) and, where it has one, `image_encoder`; or other `parts`, {name: folders}.

    A hash covers the configuration (latents_mean and latents_std are in the VAE's) and, of every weight file, its size
    and first and last MiB: enough to tell two trainings apart without reading 20 GB.
    """
    folder = Path(folder)
    if parts is None:
        parts = {"vae": ["vae"], "text_encoder": ["text_encoder", "tokenizer"]}
        if (folder / "image_encoder" / "config.json").exists():
            parts["image_encoder"] = ["image_encoder", "image_processor"]
    return {name: _identity([folder / f for f in folders]) for name, folders in parts.items()}


def _identity(folders: list[Path]) -> str | None:
    if not (folders[0] / "config.json").exists():
        return None
    digest = hashlib.sha256()
    config = json.loads((folders[0] / "config.json").read_text())
    ignored = ("transformers_version", "dtype", "torch_dtype", "architectures")  # change without changing any output
    config = {k: v for k, v in config.items() if not k.startswith("_") and k not in ignored}
    digest.update(json.dumps(config, sort_keys=True).encode())
    for folder in folders:
        patterns = ("*.safetensors", "spiece.model", "tokenizer.json", "preprocessor_config.json")
        for path in sorted(path for pattern in patterns for path in folder.glob(pattern)):
            size, chunk = path.stat().st_size, 1 << 20
            digest.update(str(size).encode())
            with open(path, "rb") as file:
                digest.update(file.read(chunk))
                file.seek(max(chunk, size - chunk))
                digest.update(file.read(chunk))
    return digest.hexdigest()[:16]


def scan(shard: Shard, file: Path) -> list[tuple[int, int, int, int]]:
    """(offset, size) in bytes of the tensors and of the json of every sample, from the tar's headers."""
    parts: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")  # packed anew it is ./00000000.json; macOS adds ._00000000.json
                key, _, suffix = name.partition(".")
                if key and suffix and member.isfile():
                    parts.setdefault(f"{folder}/{key}", {})[suffix] = member.offset_data, member.size
        end = file.stat().st_size
        samples = [(*part["safetensors"], *part["json"]) for part in parts.values() if {"safetensors", "json"} & part.keys()]
        if any(part[2] + part[3] > end for part in samples):
            raise tarfile.ReadError("it ends too early")
    except FileNotFoundError:
        raise DataError(f"{shard.path} is listed in index.json but is not there; {REMEDY}") from None
    except (tarfile.TarError, KeyError, OSError, ValueError, OverflowError) as error:
        raise DataError(f"{shard.path} is damaged ({type(error).__name__}: {error}); {REMEDY}") from None
    if len(samples) != shard.count:
        raise DataError(
            f"{shard.path} is damaged: {len(samples)} samples where index.json says {shard.count}; {REMEDY}"
        )
    return samples


def unusable(tensors: Mapping[str, torch.Tensor | None], info, length: int) -> str | None:
    """Why a sample of these tensors, latents, text (None: not asked for) and conditions, cannot be trained on; None where it can."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"has {name} of {tensor.dtype}, accepted: float16, bfloat16 or float32"
        if tensor is not None and not torch.isfinite(tensor).all():
            return f"has {name} that are not finite"
    if (text := tensors["text"]) is not None and len(text) > length:
        return f"has text of {len(text)} tokens, index.json says at most {length}"
    if not isinstance(info, dict) or not isinstance(info.get("caption"), str):
        return "has no caption"
    return None


def read_sample(path: Path, member: tuple[int, int, int, int]) -> tuple[dict[str, torch.Tensor], dict]:
    try:
        with open(path, "rb") as file:
            file.seek(member[0])
            tensors = load(file.read(member[1]))
            file.seek(member[2])
            return tensors, json.loads(file.read(member[3]))
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({type(error).__name__}: {error}); {REMEDY}") from None


def read_empty(folder: Path | Remote, length: int, width: int) -> torch.Tensor:
    """(n, D) embedding of the empty prompt."""
    path = folder / "empty.safetensors"
    try:
        text = load(path.read_bytes())["text"]
    except DataError:
        raise
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise DataError(f"{path}, the embedding of the empty prompt, cannot be read ({error}); {REMEDY}") from None
    if not (text.is_floating_point() and text.ndim == 2 and len(text) <= length and text.shape[1] == width and torch.isfinite(text).all()):
        raise DataError(f"{path}, the embedding of the empty prompt, is {tuple(text.shape)} {text.dtype}, expected at most {length} finite rows of {width}; {REMEDY}")
    return text
