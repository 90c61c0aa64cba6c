"""The page around the sections: one HTML file with its stylesheet, no scripts, nothing from a network."""

from __future__ import annotations

from html import escape

from usv.evaluation.report.front import QUALITIES, points_of
from usv.evaluation.report.inputs import KINDS, Inputs
from usv.evaluation.report.plots import pareto
from usv.evaluation.report.sections import SECTIONS, headline

COLOURS = """
:root { color-scheme: light dark; --bg: #f7f6f3; --card: #ffffff; --ink: #1d1c1a; --soft: #625e57; --line: #dfdbd3; --accent: #c2410c;
  --dense: #1d1c1a; --fewer: #7c3aed; --cache: #0b7285; --merging: #2b8a3e; --pattern: #1c6dd0; --fixed: #a16207; --ours: #d9480f; }
@media (prefers-color-scheme: dark) { :root { --bg: #161513; --card: #201f1c; --ink: #edeae4; --soft: #a8a299; --line: #38352f;
  --accent: #ff8a4c; --dense: #edeae4; --fewer: #b197fc; --cache: #3bc9db; --merging: #69db7c; --pattern: #74b0ff; --fixed: #f2c14e; --ours: #ff8a4c; } }
"""
LAYOUT = """
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--bg); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main, header, footer { max-width: 1160px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 40px; }
h1 { font-size: clamp(26px, 5vw, 40px); line-height: 1.15; margin: 0 0 8px; letter-spacing: -0.02em; text-wrap: balance; }
h2 { font-size: 24px; margin: 0 0 12px; letter-spacing: -0.01em; }
h3 { font-size: 17px; margin: 28px 0 10px; overflow-wrap: anywhere; }
h4 { font-size: 15px; margin: 14px 0 6px; color: var(--soft); font-weight: 600; }
p { max-width: 76ch; margin: 8px 0; }
header > p, footer { color: var(--soft); }
section { padding: 36px 0 4px; border-top: 1px solid var(--line); margin-top: 36px; }
nav { display: flex; flex-wrap: wrap; gap: 6px 18px; margin: 18px 0 0; font-size: 15px; }
a { color: var(--accent); text-underline-offset: 3px; }
code { font: 0.86em/1.5 ui-monospace, SFMono-Regular, Menlo, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
small { color: var(--soft); font-weight: 400; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 250px), 1fr)); gap: 16px; margin: 18px 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 16px 20px; max-width: 380px; }
.tile h3 { margin: 0; font-size: 15px; color: var(--soft); }
.tile .big { font-size: 46px; font-weight: 700; line-height: 1.1; margin: 4px 0; color: var(--accent); font-variant-numeric: tabular-nums; }
.tile ul { list-style: none; padding: 8px 0 0; margin: 10px 0 0; border-top: 1px solid var(--line); font-variant-numeric: tabular-nums; }
.tile li span { color: var(--soft); float: right; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 480px), 1fr)); gap: 20px; }
.plot { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 12px; min-width: 0; }
.plot svg { display: block; width: 100%; height: auto; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 4px 16px; padding: 0; margin: 6px 0 12px; font-size: 14px; color: var(--soft); }
.legend li { display: flex; align-items: center; gap: 6px; }
.key { display: inline-block; width: 22px; height: 0; border-top: 3px solid var(--c, var(--soft)); }
.key.theirs { border-top: 2px dashed var(--soft); } .key.ours { --c: var(--ours); }
.key.bar { --c: var(--accent); border-top-width: 10px; } .key.ideal { width: 0; height: 14px; border: 0; border-left: 3px solid var(--ink); }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: left; padding: 8px 12px; border-bottom: 1px solid var(--line); vertical-align: top; }
tbody tr:last-child > * { border-bottom: 0; }
thead th { color: var(--soft); font-weight: 600; white-space: nowrap; }
tbody th { font-weight: 600; background: var(--card); position: sticky; left: 0; }
.numbers th, .numbers td { white-space: nowrap; font-variant-numeric: tabular-nums; }
.numbers td.reason { white-space: normal; color: var(--soft); }
.runs td:nth-child(2) { min-width: 300px; } .runs td:nth-child(4) { min-width: 240px; color: var(--soft); } .runs th, .runs td:nth-child(3) { white-space: nowrap; } .runs code { overflow-wrap: normal; }
.no { display: inline-block; min-width: 1.6em; color: var(--soft); font-weight: 400; }
wbr { display: none; } th svg { width: 15px; height: 15px; vertical-align: -2px; }
.missing { border-left: 3px solid var(--line); padding: 4px 14px; color: var(--soft); }
.clips { display: flex; flex-wrap: wrap; gap: 14px; }
figure { margin: 0; width: 172px; max-width: 100%; }
figure.wide { width: auto; } figure.wide video { width: auto; max-height: 210px; }
video { display: block; width: 100%; max-width: 100%; border-radius: 8px; background: var(--line); }
figcaption { font-size: 13px; color: var(--soft); margin-top: 4px; overflow-wrap: anywhere; }
footer { padding-top: 36px; padding-bottom: 48px; font-size: 14px; }
"""
PICTURES = """
svg text { font: 15px system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; fill: var(--ink); }
svg .tick, svg .axis { fill: var(--soft); } svg .name { fill: var(--ink); font-weight: 600; } svg .tick { font-size: 14px; font-variant-numeric: tabular-nums; }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .f-dense { --c: var(--dense); } svg .f-fewer-steps { --c: var(--fewer); } svg .f-cache { --c: var(--cache); } svg .f-merging { --c: var(--merging); }
svg .f-pattern { --c: var(--pattern); } svg .f-fixed-density { --c: var(--fixed); } svg .f-ours { --c: var(--ours); }
svg polygon, svg circle { fill: var(--c); } svg .point polygon, svg .point circle { stroke: var(--card); stroke-width: 1; }
svg .interval { stroke: var(--c); stroke-width: 1.6; opacity: 0.45; }
svg .label { fill: var(--c, var(--ink)); } svg .label.f-ours, svg .label.f-dense { font-weight: 650; }
svg .front { stroke-width: 2; } svg .front.ours { stroke: var(--ours); } svg .front.theirs { stroke: var(--soft); stroke-dasharray: 6 5; opacity: 0.8; }
svg .cell { fill: var(--accent); } svg .value { font-size: 14px; } svg .value.on { fill: #1d1c1a; }
svg .curve { stroke: var(--c); stroke-width: 2.2; stroke-linejoin: round; } svg .curve.faint { stroke-width: 1; opacity: 0.35; }
.s0 { --c: var(--ours); } .s1 { --c: var(--pattern); } .s2 { --c: var(--merging); } .s3 { --c: var(--fewer); } .s4 { --c: var(--cache); } .s5 { --c: var(--fixed); }
svg .bar { fill: var(--accent); } svg .ideal { stroke: var(--ink); stroke-width: 3; }
"""
PHONE = """
@media (max-width: 480px) { main, header, footer { padding-left: 14px; padding-right: 14px; } .plot { padding: 6px; } figure { width: 110px; }
  svg text { font-size: 19px; } svg .tick { font-size: 18px; } svg .value { font-size: 17px; } tbody th { min-width: 132px; white-space: normal !important; } wbr { display: inline; } }
@media (prefers-reduced-motion: reduce) { html { scroll-behavior: auto; } }
"""
STYLE = COLOURS + LAYOUT + PICTURES + PHONE

NAMES = {
    "run": "What was run", "pareto": "Quality against seconds", "results": "Results", "ablations": "Ablations", "policy": "Policy",
    "videos": "Videos", "training": "Training", "kernels": "Kernels",
}  # fmt: skip


# no scripts and nothing from elsewhere, whatever the inputs hold
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:; base-uri 'none'; form-action 'none'"


def usable(inputs: Inputs) -> Inputs:
    """What can be drawn: each file alone is tried, and one that fails becomes a problem in words instead of costing the page."""
    kept = Inputs(videos=inputs.videos, problems=list(inputs.problems))
    for kind in KINDS:
        for file, report in inputs.results[kind].items():
            alone = Inputs()
            alone.results[kind][file] = report
            if _drawn(alone, file, kept.problems):
                kept.results[kind][file] = report
    for name in ("students", "curves"):
        for file, found in getattr(inputs, name).items():
            if _drawn(Inputs(**{name: {file: found}}), file, kept.problems):
                getattr(kept, name)[file] = found
    return kept


def _drawn(alone: Inputs, file: str, problems: list[str]) -> bool:
    try:
        headline(alone)
        for make in SECTIONS:
            make(alone)
    except Exception as error:  # whatever a stranger's file can cause
        problems.append(f"{file}: cannot be shown ({type(error).__name__}: {str(error)[:100]}), left out")
        return False
    return True


def page(inputs: Inputs, command: str, commit: str) -> str:
    """The whole document."""
    inputs = usable(inputs)
    links = "".join(f'<a href="#{anchor}">{escape(name)}</a>' for anchor, name in NAMES.items())
    body = "".join(make(inputs) for make in SECTIONS)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>USV: what was measured</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>Learned sparsification of a video diffusion transformer: what was measured</h1>
{headline(inputs)}
<nav>{links}</nav>
</header>
<main>
{body}
</main>
<footer><p>Made by <code>{escape(command)}</code> at commit <code>{escape(commit)}</code>. The page is one file and needs no network.</p></footer>
</body>
</html>
"""


def picture(report: dict, key: str) -> str:
    """The Pareto plot of one quality as an SVG file of its own, for light and dark pages."""
    name, more = QUALITIES[key]
    style = f"svg {{ background: var(--card); }}{COLOURS}{PICTURES}"
    return pareto(points_of(report, key), name, more, legend=True).replace("<title>", f"<style>{style}</style><title>", 1) + "\n"
