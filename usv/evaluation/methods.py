"""The methods of an evaluation: the dense model, students, students with another decoder; their videos and the time of their forwards."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tqdm import tqdm

import usv
from usv.config import ModelConfig
from usv.sampling.checkpoint import Student
from usv.sampling.decoder import TinyDecoder
from usv.sampling.generate import Generation, generate, latent_size, now, summed
from usv.sampling.ranks import Crew, in_turn


@dataclass(frozen=True)
class Dense:
    """The dense model at `steps` and `guidance`; None: its own."""

    steps: int | None = None
    guidance: float | None = None


@dataclass(frozen=True)
class Decoded:
    """A student whose latents are decoded by another decoder than the VAE's."""

    student: Student
    decoder: TinyDecoder


def generate_all(pipe, model: ModelConfig, methods: dict, prompts: list[str], seeds: list[int], batch_size: int, crew: Crew = Crew()) -> dict | None:
    """{name: (Generation, density, merged)} with batches of all methods interleaved. `methods`: name -> student, `Decoded` or `Dense`.

    Of several processes each makes every so-manieth batch, and the first has all; the others get None.
    """
    mine = crew.mine(len(prompts), batch_size)
    parts: dict[str, list[Generation]] = {name: [] for name in methods}
    executed: dict[str, list[tuple[float, float, int]]] = {name: [] for name in methods}  # density, merged, clips
    with tqdm(total=len(mine) * len(methods), unit="video", disable=not crew.first) as bar:
        for start in mine[::batch_size] if mine else ():
            for name, checkpoint in methods.items():
                bar.set_description(name)
                sparse, guidance, decoder = not isinstance(checkpoint, Dense), None, None
                if sparse:
                    if isinstance(checkpoint, Decoded):
                        checkpoint, decoder = checkpoint.student, checkpoint.decoder
                    usv.enable(pipe, checkpoint)
                    steps = pipe._usv.student.sampling["num_inference_steps"]
                else:
                    steps, guidance = checkpoint.steps, checkpoint.guidance
                part = slice(start, start + batch_size)
                parts[name].append(generate(pipe, model, prompts[part], seeds[part], batch_size, steps, guidance, progress=bar, decoder=decoder))
                if sparse:
                    executed[name].append((pipe._usv.record.mean_density(), pipe._usv.record.mean_merged(), len(prompts[part])))
                    usv.disable(pipe)
    everyone = crew.gather((parts, executed))
    if not crew.first:
        return None
    result = {}
    for name in methods:
        generations = in_turn([made[name] for made, _ in everyone])
        runs = [run for _, theirs in everyone for run in theirs[name]] or [(1.0, 0.0, 1)]
        clips = sum(run[2] for run in runs)  # the last batch may be smaller
        density, merged = (sum(run[i] * run[2] for run in runs) / clips for i in (0, 1))
        videos = torch.cat([g.videos for g in generations])
        result[name] = (Generation(videos, summed(g.seconds for g in generations), generations[0].forwards), density, merged)
    return result


def forward_seconds(pipe, model: ModelConfig, methods: dict, batch_size: int, repeats: int = 7) -> dict[str, dict[str, float]]:
    """Seconds of one forward of one clip, quantiles over interleaved repeats, averaged over the sampler's timesteps."""
    shape = batch_size, pipe.transformer.config.in_channels, *latent_size(pipe, model)
    place = {"device": pipe.device, "dtype": pipe.transformer.dtype}
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(**place)
    text = torch.randn(batch_size, model.max_sequence_length, pipe.transformer.config.text_dim, **place)
    dense = [name for name, method in methods.items() if isinstance(method, Dense)]
    methods = {name: method for name, method in methods.items() if name not in dense[1:]}  # one dense forward is like another
    times: dict[str, list[float]] = {name: [] for name in methods}
    for repeat in range(repeats + 1):
        for name, checkpoint in methods.items():
            sparse = not isinstance(checkpoint, Dense)
            if sparse:
                usv.enable(pipe, checkpoint)
            timesteps = [1000.0]
            if sparse:
                student = pipe._usv.student
                timesteps = student.sampling.get("student_timesteps") or [
                    (low + high) / 2 for low, high in zip((0.0, *student.plan.edges), student.plan.edges)
                ]
            begun = now()
            with torch.no_grad():
                for timestep in timesteps:
                    pipe.transformer(latents, torch.full((batch_size,), timestep, device=pipe.device), text, return_dict=False)
            if repeat:
                times[name].append((now() - begun) / len(timesteps) / batch_size)
            usv.disable(pipe)
    found = {name: {f"p{q}": float(torch.tensor(values).quantile(q / 100)) for q in (10, 50, 90)} for name, values in times.items()}
    return found | {name: found[dense[0]] for name in dense[1:]}
