"""LoRAs of a Wan transformer in the formats that circulate: random ones, each the same update in every format."""

import torch

from usv.sampling.wan_file import wan_name

TARGETS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0", "ffn.net.0.proj", "ffn.net.2")
ALPHA = 1.0  # of rank 2, where the format says it


def style(transformer, seed=3, rank=2, size=0.3):
    """{layer of the transformer: (A (rank, in), B (out, rank))} on every linear layer of the blocks, as an update B A."""
    g = torch.Generator().manual_seed(seed)
    layers = {n: m for n, m in transformer.named_modules() if isinstance(m, torch.nn.Linear) and n.endswith(TARGETS)}
    return {n: (size * torch.randn(rank, m.in_features, generator=g), size * torch.randn(m.out_features, rank, generator=g)) for n, m in layers.items()}


def diffusers(update):
    return {f"transformer.{n}.lora_{x}.weight": t for n, pair in update.items() for x, t in zip("AB", pair)}


def wan(update):
    return {f"diffusion_model.{wan_name(f'{n}.')}lora_{x}.weight": t for n, pair in update.items() for x, t in zip("AB", pair)}


def kohya(update):
    """Underscores for dots, down and up, alpha: an update of alpha / rank · up · down."""
    out = {}
    for n, (a, b) in update.items():
        name = "lora_unet_" + wan_name(f"{n}.").rstrip(".").replace(".", "_")
        out |= {f"{name}.lora_down.weight": a * len(a) / ALPHA, f"{name}.lora_up.weight": b, f"{name}.alpha": torch.tensor(ALPHA)}
    return out


def lightx2v(update, bias=0.1, norms=0.0):
    """Wan's names with updates of biases (`diff_b`) and of norms (`diff`), the latter in files zero."""
    out = wan(update)
    for i, n in enumerate(update):
        size, name = len(update[n][1]), wan_name(f"{n}.")
        out[f"diffusion_model.{name}diff_b"] = bias * torch.randn(size, generator=torch.Generator().manual_seed(i))
    blocks = sorted({n.split(".")[1] for n in update})
    width = len(next(iter(update.values()))[1])
    return out | {f"diffusion_model.blocks.{i}.self_attn.norm_q.diff": torch.full((width,), norms) for i in blocks}


FORMATS = {"diffusers": diffusers, "diffusion_model": wan, "lora_unet": kohya, "lightx2v": lightx2v}
