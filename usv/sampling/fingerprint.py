"""Which base a student belongs to: a few of its weights, kept in the student's config.json and compared when it is loaded.

    base           of the model that a student was trained from: another model of the same shapes is refused, a changed copy of it is named
    fingerprint    of the pipeline that an export was written with: exactly these weights

A copy of the base, cast, quantised or trained a little further, lies near it; of two models that were trained apart the weights differ by
more than they are long. Students from before there was a base in config.json load on any model of their shapes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch

from usv.models import lora
from usv.models.families import family_of
from usv.sampling.record import CheckpointError, pipeline_class

logger = logging.getLogger("usv")

KEPT = 64  # numbers of each weight
ANOTHER = 0.5  # ‖found − wanted‖ / ‖wanted‖ from which on it is another model: unrelated weights have about √2, fp8 has 0.03, four bits 0.1


def quantised(transformer: torch.nn.Module) -> str | None:
    """By what a transformer's weights are quantised: the method, or what stands in place of plain parameters; None in full precision."""
    if getattr(transformer, "hf_quantizer", None) is not None:
        method = getattr(getattr(transformer.hf_quantizer, "quantization_config", None), "quant_method", "some method")
        return str(getattr(method, "value", method))
    kinds = {type(p).__name__ for p in transformer.parameters()} - {"Parameter"}
    return ", ".join(sorted(kinds)) or None


def fingerprint(transformer: torch.nn.Module) -> dict[str, list[float]]:
    """A few weights of the first and last block, as they are without adapters."""
    state = lora.clean_state(transformer)
    return {name: _numbers(state[name]).tolist() for name in _names(transformer, state)}


def _names(transformer: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> list[str]:
    if hasattr(transformer, "blocks"):
        return [f"blocks.{i}.{layer}.weight" for i in (0, len(transformer.blocks) - 1) for layer in ("attn1.to_q", "ffn.net.2")]
    ends = [[n for n in state if n.startswith(f"{blocks.attribute}.") and n.endswith("to_q.weight")] for blocks in family_of(transformer).blocks]
    return [ends[0][0], ends[-1][-1]]


def _numbers(weight: torch.Tensor) -> torch.Tensor:
    """The first numbers of a weight in fp32, of a quantised one what it stands for."""
    if hasattr(weight, "quant_type"):  # GGUF
        from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

        weight = dequantize_gguf_tensor(weight)
    elif type(weight) not in (torch.Tensor, torch.nn.Parameter) and hasattr(weight, "dequantize"):
        weight = weight.dequantize()
    return weight.detach().flatten()[:KEPT].float().cpu()


def distance(wanted: Mapping[str, list[float]], transformer: torch.nn.Module) -> float | None:
    """‖found − wanted‖ / ‖wanted‖ over the weights of a fingerprint; None where they cannot be read: not on this device, or of a kind
    that does not tell its numbers."""
    try:
        found = fingerprint(transformer)
    except (NotImplementedError, RuntimeError, TypeError, ValueError):
        if quantised(transformer) is None and transformer.device.type != "meta":
            raise
        return None
    if any(len(found.get(name, ())) != len(values) for name, values in wanted.items()):
        return float("inf")
    flat = [torch.tensor([x for name in wanted for x in values[name]], dtype=torch.float64) for values in (found, wanted)]
    return float((flat[0] - flat[1]).norm() / flat[1].norm().clamp_min(1e-30))


def matches(wanted: Mapping[str, list[float]], transformer: torch.nn.Module) -> bool:
    """Whether a transformer, perhaps loaded in bf16 (2⁻⁹ relative), has these weights."""
    found = fingerprint(transformer)
    return all(
        name in found and len(found[name]) == len(values) and torch.allclose(torch.tensor(found[name]), torch.tensor(values), rtol=2**-8, atol=1e-8)
        for name, values in wanted.items()
    )


def check_base(path: Path, record: Mapping, base: torch.nn.Module, one: bool) -> None:
    """CheckpointError for a student of another model than `base`. A copy of its model that was changed is named in the log.

    path: of the folder that holds student.safetensors, or, where `one`, of the one file.
    """
    away = distance(record["base"], base) if record.get("base") else None
    if record.get("fingerprint"):  # an export: of these very weights, quantised or not
        other = distance(record["fingerprint"], base) if quantised(base) is not None else 0.0 if matches(record["fingerprint"], base) else float("inf")
        if other is not None and other >= ANOTHER:
            raise CheckpointError(f"{path}: {_exported(path, one, away)}")
        return
    if away is not None and away >= ANOTHER:
        raise CheckpointError(
            f"{path}: got another model of the same shapes (its weights differ from those of the student's base by {away:.0%}), accepted: the model that the "
            "student was trained from, or a copy of it, cast, quantised or trained a little further"
        )
    if away is not None and quantised(base) is None and not matches(record["base"], base) and not _coarse(base):
        logger.warning("usv: %s: the model differs by %.1g%% from the one that the student was trained from", path, 100 * away)


def _exported(path: Path, one: bool, away: float | None) -> str:
    """What to do where an export does not find the weights that it was written with."""
    place = path if one else path.parent
    if one and away is not None and away >= ANOTHER:
        return f"got another model of the same shapes (its weights differ from those of the student's base by {away:.0%}), accepted: the model that the student was trained from"
    adapted = one or (place / "pytorch_lora_weights.safetensors").is_file()
    first = f"pipe.load_lora_weights({str(place)!r}), fuse_lora() and unload_lora_weights()" if adapted else f"load {pipeline_class(place)}.from_pretrained({str(place)!r})"
    return f"its weights are those of the pipeline it was exported with, and this pipeline has others; {first} first"


def _coarse(transformer: torch.nn.Module) -> bool:
    """Whether weights are kept in eight bits, as layerwise casting does."""
    return any(p.is_floating_point() and p.element_size() == 1 for p in transformer.parameters())
