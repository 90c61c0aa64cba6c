"""The page: a prompt, a budget, dense | student side by side, and the plan as layer × timestep pictures. gradio, on 127.0.0.1 only.

The student's clip is shown as soon as it is made; the dense one, which takes longer, follows, and is kept for the same prompt and seed. The
plan follows the slider at once: it is decoded, not run.
"""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Iterator
from html import escape
from pathlib import Path

import gradio as gr

from usv.evaluation.report.plots import heatmap
from usv.evaluation.studio.stage import Stage, Take
from usv.sparse.plan import SparsityPlan
from usv.video import magnified, write_mp4

LOCAL = "127.0.0.1"
PROMPTS = ("a cat, the camera pans left", "a rocket, the camera tilts up quickly", "an astronaut, the camera rolls right", "a flower, the camera zooms out")
LOWEST, HIGHEST = 0.05, 1.0  # of the slider; what a student can be given stands beside it
FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "DejaVu Sans", "sans-serif"]

STYLE = """
.gradio-container { max-width: 1240px !important; margin: 0 auto !important; }
.usv { --ink: var(--body-text-color); --soft: var(--body-text-color-subdued); --line: var(--border-color-primary); --accent: #ea6a2a; --c: var(--accent); }
.usv h1 { font-size: 25px; margin: 0; letter-spacing: -0.01em; } .usv p { margin: 4px 0; color: var(--soft); }
.usv-clips, .usv-plans { display: grid; grid-template-columns: 1fr 1fr; gap: 16px; }
.usv figure { margin: 0; } .usv figcaption { font-weight: 600; padding: 0 0 6px; color: var(--ink); }
.usv .frame { aspect-ratio: var(--shape); border-radius: 10px; overflow: hidden; background: var(--background-fill-secondary); border: 1px solid var(--line);
  display: flex; align-items: center; justify-content: center; color: var(--soft); text-align: center; }
.usv video { width: 100%; height: 100%; display: block; object-fit: contain; }
.usv table { width: 100%; border-collapse: collapse; margin: 12px 0 0; font-variant-numeric: tabular-nums; }
.usv table, .usv thead, .usv tbody, .usv tr { border: 0 !important; }
.usv th, .usv td { text-align: right; padding: 5px 8px; border: 0 !important; border-bottom: 1px solid var(--line) !important; color: var(--ink); font-size: 14px; }
.usv td { white-space: nowrap; } .usv th:first-child { text-align: left; }
.usv thead th { color: var(--soft); font-weight: 500; } .usv .best { color: var(--accent); font-weight: 700; }
.usv .plot { border: 1px solid var(--line); border-radius: 10px; padding: 10px; } .usv h4 { margin: 0 0 4px; font-size: 14px; font-weight: 600; }
.usv svg { width: 100%; height: auto; display: block; } .usv svg text { font: 15px system-ui, sans-serif; fill: var(--ink); }
.usv svg .tick, .usv svg .axis { fill: var(--soft); font-size: 14px; } .usv svg .cell { fill: var(--accent); } .usv svg .value { font-size: 14px; }
.usv svg .value.on { fill: #1d1c1a; } .usv svg polygon { fill: var(--accent); }
.usv .wrong { border-left: 4px solid #c92a2a; padding: 8px 12px; color: var(--ink); background: var(--background-fill-secondary); border-radius: 4px; }
@media (max-width: 640px) { .usv-clips, .usv-plans { grid-template-columns: 1fr; } }
"""


def build(stage: Stage) -> gr.Blocks:
    """The page of a stage."""
    shape, fixed = f"{stage.model.width} / {stage.model.height}", stage.reach is None
    start = stage.own_budget if fixed else min(max(stage.own_budget, stage.reach[0]), stage.reach[1])

    def budget_of(value):
        return None if fixed else value

    def plan_shown(value) -> str:
        try:
            return plans(stage, stage.plan(budget_of(value)))
        except ValueError as error:
            return wrong(error)

    def make(prompt, value, seed, beside) -> Iterator[tuple]:
        shown = lambda **takes: clips(shape, stage.model.fps, **takes)  # noqa: E731
        try:
            plan = stage.plan(budget_of(value))
            yield shown(), plans(stage, plan), ""
            student = stage.sparse(prompt, seed, budget_of(value))
            yield shown(student=student), plans(stage, plan), figures(stage, plan, student)
            if beside:
                dense = stage.dense(prompt, seed)
                yield shown(student=student, dense=dense), plans(stage, plan), figures(stage, plan, student, dense)
        except ValueError as error:  # of the prompt, the seed, the budget: what was there stays
            yield gr.skip(), gr.skip(), wrong(error)

    with gr.Blocks(title="USV studio", analytics_enabled=False) as page:
        gr.HTML(head(stage))
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                prompt = gr.Textbox(PROMPTS[0], label="Prompt", lines=2, max_lines=4)
                budget = gr.Slider(
                    LOWEST, HIGHEST, round(start, 3), step=0.005, label="Budget: a forward's compute as a share of the dense one's", interactive=not fixed,
                    info=stage.fixed or f"This student can be given {stage.reach[0]:g} to {stage.reach[1]:g}.",
                )  # fmt: skip
                with gr.Row():
                    seed = gr.Number(0, label="Seed", precision=0, min_width=110)
                    beside = gr.Checkbox(True, label="Dense beside it", min_width=150)
                button = gr.Button("Make the clips", variant="primary")
                gr.Examples([[text] for text in PROMPTS], [prompt], label="Prompts")
            with gr.Column(scale=3, min_width=420):
                stage_html = gr.HTML(clips(shape, stage.model.fps), elem_id="clips")
                said = gr.HTML("", elem_id="said")
        plan_html = gr.HTML(plan_shown(start), elem_id="plan")
        told = [prompt, budget, seed, beside]
        gr.on([button.click, prompt.submit], make, told, [stage_html, plan_html, said], concurrency_limit=1, api_name="make")
        budget.change(plan_shown, budget, plan_html, show_progress="hidden", api_name="plan")
    return page


def serve(stage: Stage, port: int = 0, block: bool = True) -> tuple[gr.Blocks, str]:
    """Serve the page to this machine; the page and its address. port 0: any that is free. OSError where the port is taken."""
    page = build(stage)
    theme = gr.themes.Soft(font=FONTS, font_mono=["ui-monospace", "monospace"])  # gradio's own fonts would be asked of a server
    _, address, _ = page.queue().launch(
        server_name=LOCAL, server_port=port or None, share=False, quiet=True, prevent_thread_lock=True, theme=theme, css=STYLE, footer_links=[], ssr_mode=False,
    )  # fmt: skip
    print(f"usv.studio: {address} (Ctrl-C ends it)", flush=True)
    if block:
        page.block_thread()
    return page, address


# ---- the page's parts -------------------------------------------------------------------------------------------------


def head(stage: Stage) -> str:
    m, sampling = stage.model, stage.student.sampling
    own = f"{stage.own_budget:.3f}".rstrip("0")
    return (
        f'<div class="usv"><h1>USV studio</h1><p>{escape(m.path)}, {m.num_frames} frames of {m.width}×{m.height}; the student takes {sampling["num_inference_steps"]} steps, '
        f"the dense model {m.num_inference_steps} with guidance {m.guidance_scale:g}. The plan that the student was saved with costs {own} of a dense forward.</p></div>"
    )


def clips(shape: str, fps: int, dense: Take | None = None, student: Take | None = None) -> str:
    """Both clips, or what stands in their place."""
    figures_ = "".join(
        f'<figure><figcaption>{name}</figcaption><div class="frame" style="--shape: {shape}">{"not made yet" if made is None else video(made, fps, name)}</div></figure>'
        for name, made in (("Dense", dense), ("Student", student))
    )
    return f'<div class="usv usv-clips">{figures_}</div>'


def video(made: Take, fps: int, name: str) -> str:
    """A looping clip as a data URI: no file is left behind, and none is asked for."""
    with tempfile.TemporaryDirectory(prefix="usv-studio-") as folder:
        path = Path(folder) / "clip.mp4"
        write_mp4(path, made.video, fps, magnified(made.video.shape[-1]))
        data = base64.b64encode(path.read_bytes()).decode()
    return f'<video muted autoplay loop playsinline aria-label="{escape(name)}" src="data:video/mp4;base64,{data}"></video>'


def figures(stage: Stage, plan: SparsityPlan, student: Take, dense: Take | None = None) -> str:
    """What both took and executed."""
    rows = [("Dense", dense, 1.0)] if dense is not None else []
    rows.append(("Student", student, stage.cost(plan)))
    cells = "".join(
        f"<tr><th>{name}</th><td>{made.seconds:.2f} s</td><td>{made.denoising:.2f} s</td><td>{made.forwards}</td><td>{made.density:.3f}</td><td>{made.merged:.0%}</td><td>{cost:.3f}</td></tr>"
        for name, made, cost in rows
    )
    faster = "" if dense is None else f'<p>Denoising <span class="best">{dense.denoising / student.denoising:.1f}× faster</span>, the clip {dense.seconds / student.seconds:.1f}×.</p>'
    names = ("", "clip", "denoising", "forwards", "density executed", "tokens merged", "compute of a forward")
    return f'<div class="usv"><table><thead><tr>{"".join(f"<th>{name}</th>" for name in names)}</tr></thead><tbody>{cells}</tbody></table>{faster}</div>'


def plans(stage: Stage, plan: SparsityPlan) -> str:
    """The plan, layer by timestep: density of attention, tokens merged."""
    timesteps = stage.student.sampling.get("student_timesteps") or []
    titles = (("density", "Attention density: stronger colour computes more"), ("merge", "Tokens merged: stronger colour merges more"))
    pictures = "".join(f'<div class="plot"><h4>{title}</h4>{heatmap(plan, kind, timesteps)}</div>' for kind, title in titles)
    return f'<div class="usv"><p>The plan: {stage.cost(plan):.3f} of a dense forward\'s compute, {plan.merged():.0%} of the tokens merged.</p><div class="usv-plans">{pictures}</div></div>'


def wrong(error: Exception) -> str:
    return f'<div class="usv"><p class="wrong">{escape(str(error))}</p></div>'
