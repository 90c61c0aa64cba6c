"""A student's forward on Wan-mini, eager against compiled: python tests/compiled.py

CPU seconds of one forward of one clip under each row of the plan, one thread, the two in turn in one process, the order drawn anew each round; the
graphs and breaks that Dynamo counted; and where the time of either goes (torch.profiler, by operator).
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import time

import torch
from torch._dynamo.utils import counters

import usv
from usv.config import ModelConfig
from usv.sampling.generate import load_pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", default="data/students/usv_mini")
    parser.add_argument("--model", default="data/wan-mini")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--profile", action="store_true", help="where the time goes, after the rounds")
    args = parser.parse_args()
    torch.set_num_threads(1)
    m, pipe = ModelConfig(), load_pipeline(args.model)
    usv.enable(pipe, args.ckpt)
    eager = pipe.transformer
    compiled = copy.deepcopy(eager)
    compiled.compile_repeated_blocks(fullgraph=True)
    latents = torch.randn(1, eager.config.in_channels, m.num_frames, m.height // pipe.vae_scale_factor_spatial, m.width // pipe.vae_scale_factor_spatial)
    text, edges = torch.randn(1, m.max_sequence_length, eager.config.text_dim), eager._planned.plan.edges
    models = {"eager": eager, "compiled": compiled}

    @torch.no_grad()
    def forwards(name: str) -> list[torch.Tensor]:
        return [models[name](latents, torch.tensor([edge - 1.0]), text, return_dict=False)[0] for edge in edges]

    begun = time.process_time()
    counters.clear()
    wanted, found = forwards("eager"), forwards("compiled")
    away = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted))
    compile_seconds = time.process_time() - begun
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for round in range(args.rounds):
        for name in random.Random(round).sample(list(models), 2):
            begun = time.process_time()
            forwards(name)
            seconds[name].append((time.process_time() - begun) / len(edges))
    print(json.dumps({
        "graphs": counters["stats"]["unique_graphs"], "breaks": dict(counters["graph_break"]), "largest_difference": away, "compile_cpu_seconds": compile_seconds,
        **{f"{name}_median": statistics.median(values) for name, values in seconds.items()}, **{f"{name}_min": min(values) for name, values in seconds.items()},
        "speedup_of_medians": statistics.median(seconds["eager"]) / statistics.median(seconds["compiled"]), "speedup_of_minima": min(seconds["eager"]) / min(seconds["compiled"]),
    }, indent=1), flush=True)  # fmt: skip
    for name in models if args.profile else ():
        with torch.profiler.profile() as profile:
            forwards(name)
        print(name, profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=14, max_name_column_width=60), sep="\n")


if __name__ == "__main__":
    main()
