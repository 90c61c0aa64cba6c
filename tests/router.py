"""What training only a router loses and keeps on Wan-mini, and a style beside students:

    python data/prepare.py --camera-motion 960 --seed 1 --split val=0.05 --model data/wan-mini --out data/shards/camera
    accelerate launch train.py experiment=usv_router
    accelerate launch train.py experiment=usv_router optim.train=all policy=inherit objective.init=outputs/usv_router/student model.guidance_scale=1 optim.lr=1e-3 output_dir=outputs/usv_router_twin
    python tests/router.py style      a LoRA of rank 8 that makes clips sepia, on the base: outputs/style
    python tests/router.py measure    data/results/router_wan_mini.json, of which tests/together.py quotes

The twin is trained whole on the router's plan, from where the router ended and as many steps further, towards the same velocities. Errors are
‖student − teacher‖² / ‖teacher‖² of the velocity at held-out clips, unguided, every timestep bin alike.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import usv
from usv import flow
from usv.config import ModelConfig
from usv.evaluation.clips import held_out, requests
from usv.evaluation.evaluate import machine
from usv.files import write_result
from usv.metrics import motion_accuracy, psnr
from usv.models.forward import SparseTransformer
from usv.sampling.checkpoint import load_student
from usv.sampling.generate import generate, load_pipeline
from usv.sparse.grid import tile_layout
from usv.training.run import commit

ROOT = Path(__file__).resolve().parents[1]
SEPIA = torch.tensor([1.0, 0.8, 0.55])
STYLE, SEED, RANK = "outputs/style", 11, 8
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]


# ---- the style ----------------------------------------------------------------------------------------------------------------------------


def sepia(videos: torch.Tensor) -> torch.Tensor:
    """(…, 3, H, W) in [0, 1]: brightness in one colour."""
    grey = (videos * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(-3, keepdim=True)
    return grey * SEPIA.view(3, 1, 1)


def off_tint(videos: torch.Tensor) -> float:
    """Share of the pixels' length that lies beside the colour of sepia: 0 for a sepia clip."""
    tint = (SEPIA / SEPIA.norm()).view(3, 1, 1)
    along = (videos * tint).sum(-3, keepdim=True) * tint
    return float((videos - along).norm() / videos.norm())


@torch.no_grad()
def encoded(pipe, frames: torch.Tensor) -> torch.Tensor:
    """(B, T, 3, H, W) in [0, 1] -> normalised latents (B, C, T, h, w)."""
    vae = pipe.vae
    mean, std = (torch.tensor(x).view(1, -1, 1, 1, 1) for x in (vae.config.latents_mean, vae.config.latents_std))
    return (vae.encode(2 * frames.transpose(1, 2) - 1).latent_dist.mode() - mean) / std


def train_style(args) -> None:
    """Flow matching on sepia clips by adapters on the base, dense."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    sys.path.insert(0, str(ROOT / "data"))
    import camera_motion

    model, pipe = ModelConfig(), load_pipeline(args.model)
    transformer = pipe.transformer.requires_grad_(False)
    torch.manual_seed(SEED)
    transformer.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS))
    weights = [p for p in transformer.parameters() if p.requires_grad]
    optimizer, generator = torch.optim.Adam(weights, args.lr), torch.Generator().manual_seed(SEED)
    for step in range(args.steps):
        clips = [camera_motion.sample_clip(int(i), SEED, model.num_frames, model.height) for i in torch.randint(120, (args.batch_size,), generator=generator)]
        x0 = encoded(pipe, sepia(torch.stack([c.frames for c in clips]).float() / 255))
        text = pipe.encode_prompt([c.caption for c in clips], do_classifier_free_guidance=False, max_sequence_length=model.max_sequence_length)[0].detach()
        sigma = flow.shift_sigma(flow.stratified_uniform(len(x0), generator), model.flow_shift)
        noise = torch.randn(x0.shape, generator=generator)
        found = transformer(flow.interpolate(x0, noise, sigma), 1000 * sigma, text, return_dict=False)[0]
        loss = F.mse_loss(found, flow.velocity(x0, noise))
        optimizer.param_groups[0]["lr"] = args.lr * min(1.0, (args.steps - step) / (0.4 * args.steps))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step}: {loss.item():.4f}", flush=True)
    pipe.save_lora_weights(args.style, transformer_lora_layers=get_peft_model_state_dict(transformer))


# ---- velocities ---------------------------------------------------------------------------------------------------------------------------


def points(student, args) -> list[tuple[float, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(middle of a timestep bin, x_t, timestep (B,), text) of held-out clips, one for each bin of a student's plan; of a few-step student at
    its timesteps."""
    batch = held_out(args.shards, args.clips, args.model, "--clips: more than")[0][0]
    places, bins = (torch.arange(args.clips) + 0.5) / args.clips, len(student.plan.edges)
    levels = [torch.full_like(places, t / 1000) for t in student.sampling.get("student_timesteps") or ()]
    found = []
    for index, sigma in enumerate(levels or [flow.bin_levels(i, places, bins, ModelConfig().flow_shift) for i in range(bins)]):
        noise = torch.randn(batch["latents"].shape, generator=torch.Generator().manual_seed(index))
        found.append((float(1000 * sigma.median()), flow.interpolate(batch["latents"], noise, sigma), 1000 * sigma, batch["text"]))
    return found


@torch.no_grad()
def velocities(model: SparseTransformer, where, plan=None) -> list[torch.Tensor]:
    """Of a network at every point, under a plan or dense."""
    return [model(x, t, text, None if plan is None else plan.at(middle))[0] for middle, x, t, text in where]


def error(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """Mean over the points of ‖found − wanted‖² / ‖wanted‖²."""
    return sum(float((a - b).square().sum() / b.square().sum()) for a, b in zip(found, wanted)) / len(wanted)


@torch.no_grad()
def changes(pipe, args, names: dict[str, str]) -> dict[str, dict[str, float]]:
    """What the style changes in each student's velocity beside what it changes in the dense model's, at the same points: cosine of the two, and
    the ratio of their lengths."""
    rows = {}
    for name, folder in names.items():
        where, both = points(load_student(folder, pipe.transformer), args), []
        for enabled in (True, False):
            if enabled:
                usv.enable(pipe, folder)
            found = [[pipe.transformer(x, t, text, return_dict=False)[0] for _, x, t, text in where]]
            pipe.load_lora_weights(args.style, adapter_name="style")
            found.append([pipe.transformer(x, t, text, return_dict=False)[0] for _, x, t, text in where])
            pipe.unload_lora_weights()
            usv.disable(pipe)
            both.append(torch.cat([(b - a).flatten() for a, b in zip(*found)]))
        rows[name] = {"cosine": float(F.cosine_similarity(*both, dim=0)), "length": float(both[0].norm() / both[1].norm())}
    return rows


# ---- videos -------------------------------------------------------------------------------------------------------------------------------


def videos(pipe, args, names: dict[str, str | None]) -> dict[str, dict]:
    """The style in videos: off-tint with it and without, how near the styled one is to the other made sepia, motions."""
    model, rows = ModelConfig(path=args.model), {}
    prompts, _, motions, _ = requests(model, args.videos)
    for name, folder in names.items():
        if folder is not None:
            usv.enable(pipe, folder)
        few = folder is not None and pipe._usv.student.sampling.get("student_timesteps")
        steps, made = len(few) if few else args.steps, {}
        for styled in (False, True):
            if styled:
                pipe.load_lora_weights(args.style, adapter_name="style")
            made[styled] = generate(pipe, model, prompts, list(range(args.videos)), 4, steps).videos
        pipe.unload_lora_weights()
        usv.disable(pipe)
        rows[name] = {
            "steps": steps, "off_tint": off_tint(made[False]), "off_tint_styled": off_tint(made[True]), "psnr_to_sepia_of_unstyled": float(psnr(made[True], sepia(made[False])).mean()),
            "motion": motion_accuracy(made[False], motions).accuracy, "motion_styled": motion_accuracy(made[True], motions).accuracy,
        }  # fmt: skip
        print(name, rows[name], flush=True)
    return rows


# ---- the report ---------------------------------------------------------------------------------------------------------------------------


def router_errors(pipe, args) -> tuple[dict[str, float], dict]:
    """Held-out errors of the router's plan with untrained, trained and int8 gates' base, and of the twin; and about the plan."""
    router, twin = (load_student(folder, pipe.transformer) for folder in (args.router, args.twin))
    teacher, tile, plan = SparseTransformer(copy.deepcopy(pipe.transformer), router.model.tile), router.model.tile, router.plan
    where = points(router, args)
    wanted = velocities(teacher, where)
    if twin.plan != plan:
        raise ValueError(f"--twin: got a student of another plan than --router's, accepted: one of policy=inherit with {args.router}")
    errors = {name: error(velocities(model, where, plan), wanted) for name, model in (("untrained", SparseTransformer(copy.deepcopy(pipe.transformer), tile)), ("router", router.model), ("full", twin.model))}
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError:
        print("int8: not measured, torchao is not installed")
    else:
        quantised = copy.deepcopy(pipe.transformer)
        quantize_(quantised, Int8WeightOnlyConfig())
        int8 = load_student(args.router, quantised)
        errors["router_int8"] = error(velocities(int8.model, where, plan), wanted)
        errors["dense_int8"] = error(velocities(SparseTransformer(quantised, tile), where), wanted)
    about = {"steps": [s.training["steps"] for s in (router, twin)], "density": plan.density(tile_layout(router.model.grid_of(where[0][1].shape), tile).num_blocks), "merged": plan.merged()}
    return errors, about


def measure(args) -> dict:
    begun = time.process_time()
    pipe = load_pipeline(args.model)
    errors, about = router_errors(pipe, args)
    print(errors, flush=True)
    students = {"router": args.router, "full": args.twin, "few_step": args.few_step}
    report = {
        "command": "python tests/router.py " + " ".join(sys.argv[1:]), "commit": commit(), "machine": machine(), "clips": args.clips, "videos": args.videos,
        "plan": about, "error": errors, "router_over_full": errors["router"] / errors["full"],
        "int8_over_fp32": errors["router_int8"] / errors["router"] if "router_int8" in errors else None,
    }  # fmt: skip
    styled = (Path(args.style) / "pytorch_lora_weights.safetensors").is_file()
    if styled:
        report["style"] = changes(pipe, args, students)
        print(report["style"], flush=True)
    else:
        print(f"style: not measured, there is none in {args.style}; python tests/router.py style")
    if styled and args.videos:
        report["style_videos"] = videos(pipe, args, {"dense": None, **{name: students[name] for name in ("router", "few_step")}})
    report["cpu_seconds"] = round(time.process_time() - begun, 1)
    write_result(args.out, report)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("style", "measure"))
    parser.add_argument("--model", default=str(ROOT / "data" / "wan-mini"))
    parser.add_argument("--style", default=STYLE)
    parser.add_argument("--steps", type=int, help="style: of training (100); measure: of the sampler of dense and router (10)")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--shards", default="data/shards/camera")
    parser.add_argument("--router", default="outputs/usv_router/student")
    parser.add_argument("--twin", default="outputs/usv_router_twin/student")
    parser.add_argument("--few-step", default="data/students/usv_few_step")
    parser.add_argument("--clips", type=int, default=16, help="held-out clips of the errors")
    parser.add_argument("--videos", type=int, default=16, help="of each method; 0: none")
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "results" / "router_wan_mini.json")
    args = parser.parse_args()
    args.steps = args.steps or (100 if args.what == "style" else 10)
    train_style(args) if args.what == "style" else measure(args)


if __name__ == "__main__":
    main()
