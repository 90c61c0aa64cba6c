"""LoRAs on an enabled pipeline, loaded before `usv.enable` or after, by the pipeline's own methods:

    pipe.load_lora_weights("style.safetensors"); usv.enable(pipe, STUDENT)      carried over: weights, scales, fused or not
    usv.enable(pipe, STUDENT); pipe.load_lora_weights("style.safetensors")      set_adapters, fuse_lora, hotswap, unload as ever
    usv.disable(pipe)                                                           the adapters that were there before `enable`

diffusers reads the file. What it would leave out without a word is named, what it would read nothing of is refused.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping

import torch
from torch import nn

from usv.models.lora import fused_in
from usv.sampling.record import CheckpointError
from usv.sampling.wan_file import wan_name

logger = logging.getLogger("usv")
NOT_OF_THE_FILE = ("low_cpu_mem_usage", "load_into_transformer_2")  # arguments of load_lora_weights alone
_ENDING = re.compile(r"\.(lora_A|lora_B|lora_down|lora_up|diff|diff_b|alpha|dora_scale)(\.weight)?$")


def fused_loras(pipe) -> set[str]:
    """Names of the LoRAs that the pipeline was told to fuse, also those whose adapters were unloaded since."""
    return set(getattr(pipe, "_merged_adapters", ()))


def set_fused(pipe, names: set[str]) -> None:
    """The inverse of `fused_loras`."""
    vars(pipe).pop("_merged_adapters", None)
    if names:
        pipe._merged_adapters = set(names)


def check_unloaded(pipe, current: list[nn.Module], own: set[str], whole: bool) -> None:
    """CheckpointError where a LoRA was fused and then unloaded, so that a student's weights would be without it.

    current: the transformers of the pipeline now. own: what was fused before a student was enabled, where one is. whole: whether the
    student has all weights of its own; one of adapters has the pipeline's, fused ones included.
    """
    lost = fused_loras(pipe) - set().union(*map(fused_in, current)) - (set() if whole else own)
    if lost:
        raise CheckpointError(
            f"enable: got a pipeline into which the LoRA(s) {sorted(lost)} were fused and then unloaded, accepted: load and fuse them "
            "without pipe.unload_lora_weights(), or after usv.enable; else the student would run without them"
        )


def load_lora_weights(base: type, pipe, source, *args, **kwargs):
    """`base.load_lora_weights` on an enabled pipeline. CheckpointError for a file of which diffusers reads nothing, or not this way."""
    name = "a state dict" if isinstance(source, Mapping) else str(source)
    how = {key: value for key, value in kwargs.items() if key not in (*NOT_OF_THE_FILE, "adapter_name", "hotswap")}
    try:
        read = base.lora_state_dict(dict(source) if isinstance(source, Mapping) else source, **how)
    except KeyError as error:
        raise CheckpointError(f"load_lora_weights: got {name}, in which diffusers' converter misses {error}, accepted: a file that has it for every layer") from None
    read = read[0] if isinstance(read, tuple) else read
    raw = _raw(source, **how)
    if not any(key.startswith(("transformer.", "transformer_2.", "text_encoder")) for key in read):
        raise CheckpointError(
            f"load_lora_weights: got {name}, whose names diffusers does not know (e.g. {next(iter(raw), 'none')}), accepted: transformer.…lora_A.weight, "
            "diffusion_model.…, lora_unet_… with alpha; no layer would be changed"
        )
    if out := left_out(raw, read):
        logger.warning(
            "usv: %s: diffusers leaves out %d of %d tensors, with a student and without: %s%s", name, len(out), len(raw), ", ".join(out[:4]), " …" * (len(out) > 4)
        )
    return base.load_lora_weights(pipe, source, *args, **kwargs)


def _raw(source, weight_name=None, use_safetensors=None, **how) -> Mapping[str, torch.Tensor]:
    """The tensors of a LoRA as they are named in the file."""
    if isinstance(source, Mapping):
        return source
    from diffusers.loaders.lora_base import _fetch_state_dict

    where = {key: how.get(key) for key in ("local_files_only", "cache_dir", "force_download", "proxies", "token", "revision", "subfolder")}
    return _fetch_state_dict(source, weight_name, True if use_safetensors is None else use_safetensors, user_agent=None, allow_pickle=use_safetensors is None, **where)[0]


def left_out(raw: Mapping[str, torch.Tensor], read: Mapping[str, torch.Tensor]) -> list[str]:
    """Tensors of a file that say something (not zero) and that diffusers made nothing of.

    raw: as they are named in the file. read: by `lora_state_dict`. Names of Wan's own (diffusion_model.…) are looked up one by one; of
    other formats converters take all or fail.
    """
    return [name for name, tensor in raw.items() if not _used(name, read) and bool(tensor.any())]


def _used(name: str, read: Mapping[str, torch.Tensor]) -> bool:
    if not name.startswith("diffusion_model."):
        return name not in read or name.startswith(("transformer.", "transformer_2.", "text_encoder"))
    found = _ENDING.search(name)
    if found is None:
        return False
    module = wan_name(name[len("diffusion_model.") : found.start()] + ".", back=True)
    kind = found.group(1)
    if kind == "diff":
        return module == "proj_out." and f"transformer.{module}lora_A.weight" in read  # the head's, as an adapter of full rank
    ending = {"diff_b": "lora_B.bias", "alpha": "lora_A.weight", "lora_A": "lora_A.weight", "lora_down": "lora_A.weight"}.get(kind, "lora_B.weight")
    return kind != "dora_scale" and f"transformer.{module}{ending}" in read
