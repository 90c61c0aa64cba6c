"""The sections of the page, each a function of the inputs that returns HTML; what is missing names the command that makes it."""

from __future__ import annotations

import base64
from html import escape

from usv.evaluation.bench.denoise import said
from usv.evaluation.judge import against_dense, floor_of
from usv.evaluation.report.front import NOT_PEERS, QUALITIES, family_of, points_of, uncovered
from usv.evaluation.report.inputs import Inputs, Video, axes_of
from usv.evaluation.report.plots import MARKS, SERIES, css, curves, heatmap, legend_mark, pareto, speed_bars

MOST_VIDEOS, MOST_PROMPTS = 36, 4  # browsers stop at some tens of players
MAKES = {
    "comparison": "python -m usv.evaluate --ckpt outputs/usv_mini/student --out data/results/usv_mini.json",
    "peers": "python -m usv.peers --ckpt usv_mini=outputs/usv_mini/student --out data/results/peers.json",
    "axes": "make ablation",
    "policies": "python -m usv.compare_policies --out data/results/policies_wan_mini.json",
    "patterns": "python -m usv.compare_patterns --out data/results/patterns_wan_mini.json",
    "students": "python -m usv.report --student outputs/usv_mini/student",
    "videos": "python -m usv.peers --videos outputs/videos && python -m usv.report --videos outputs/videos",
    "curves": "accelerate launch train.py",
    "kernels": "python -m usv_kernels.bench",
}


# qualities of a row -> how they are called, digits
LABELLED = (("subject_accuracy", "subject accuracy", 3), ("motion_accuracy", "motion accuracy", 3))
UNLABELLED = (("subject_consistency", "consistency", 3), ("flicker", "flicker", 4), ("flow_warp_error", "warp error", 4))


def labelled(report: dict) -> bool:
    """Whether subject and motion were known: not of a user's own clips."""
    return not report.get("real")


def missing(what: str, key: str) -> str:
    return f'<p class="missing">{escape(what)} Made by <code>{escape(MAKES[key])}</code></p>'


def section(anchor: str, title: str, body: str) -> str:
    return f'<section id="{anchor}"><h2>{escape(title)}</h2>{body}</section>'


def table(head: list[str], rows: list[list[str]], classes: str = "") -> str:
    """Cells are HTML already. A row shorter than the head lets its last cell span the rest."""
    lines = ["<tr>" + "".join(f'<th scope="col">{cell}</th>' for cell in head) + "</tr>"]
    for row in rows:
        span = len(head) - len(row) + 1
        cells = [f'<th scope="row">{row[0]}</th>'] + [f"<td>{cell}</td>" for cell in row[1:-1]]
        cells.append(f'<td colspan="{span}" class="reason">{row[-1]}</td>' if span > 1 else f"<td>{row[-1]}</td>")
        lines.append("<tr>" + "".join(cells) + "</tr>")
    return f'<div class="scroll" tabindex="0"><table class="{classes}"><thead>{lines[0]}</thead><tbody>{"".join(lines[1:])}</tbody></table></div>'


def environment(report: dict) -> str:
    """Device, threads and versions of a result, in a line."""
    where = report.get("machine") or report.get("environment") or {}
    packages = {**{k: where[k] for k in ("torch", "python", "diffusers") if k in where}, **report.get("versions", {})}
    words = [str(where["device"])] if "device" in where else []
    words += [f"{where['threads']} threads"] if "threads" in where else []
    return ", ".join(words + [f"{k} {v}" for k, v in packages.items() if v])


def what_was_run(inputs: Inputs) -> str:
    """Command, commit and machine of every result on the page."""
    rows = []
    for reports in inputs.results.values():
        for file, report in reports.items():
            commit = str(report.get("commit") or report.get("environment", {}).get("commit") or "not stated")
            command = str(report.get("command", "not stated"))
            short = commit if commit.startswith("not") else commit[:9]
            rows.append([escape(file.rsplit("/", 1)[-1]), f"<code>{escape(command)}</code>", f"<code>{escape(short)}</code>", escape(environment(report))])
    body = table(["result", "command", "commit", "machine"], rows, "runs") if rows else missing("No results were found.", "comparison")
    if inputs.problems:
        body += "<p>Not read:</p><ul>" + "".join(f"<li>{escape(problem)}</li>" for problem in inputs.problems) + "</ul>"
    return section("run", "What was run", body)


def headline(inputs: Inputs) -> str:
    """For each student of the largest comparison: its speed, and its quality beside the dense model's."""
    comparisons = [r for r in inputs.results["comparison"].values() if r["methods"].get("dense", {}).get("denoise_seconds")]
    if not comparisons:
        return missing("No comparison with the dense model was found.", "comparison")
    report = max(comparisons, key=lambda r: r.get("clips", 0))
    dense, tiles = report["methods"]["dense"], []
    for name, row in report["methods"].items():
        if family_of(name, row) != "ours" or "denoise_seconds" not in row:
            continue
        words = f"{row['denoise_seconds']:.2f} s a clip where dense takes {dense['denoise_seconds']:.2f} s"
        quality = "".join(
            f"<li><b>{row[key]:.{digits}f}</b> {label} <span>dense {dense[key]:.{digits}f}</span></li>"
            for key, label, digits in (*(LABELLED if labelled(report) else UNLABELLED), ("frechet_distance", "Fréchet distance", 0))
            if row.get(key) is not None and dense.get(key) is not None
        )  # fmt: skip
        tiles.append(f'<div class="tile"><h3>{escape(name)}</h3><p class="big">{dense["denoise_seconds"] / row["denoise_seconds"]:.1f}×</p><p>{words}</p><ul>{quality}</ul></div>')
    note = f"<p>{escape(str(report.get('clips', '?')))} clips a method, the same prompts and seeds in one run; {escape(environment(report))}.</p>"
    return note + (f'<div class="tiles">{"".join(tiles)}</div>' if tiles else missing("No student was compared.", "comparison"))


def fronts(inputs: Inputs) -> str:
    """Pareto plots of every comparison, and where the students lose."""
    parts = []
    for file, report in by_size(inputs):
        plots, words = [], []
        for key, (name, more) in QUALITIES.items():
            points = points_of(report, key)
            if len(points) < 2:
                continue
            plots.append(f'<div class="plot">{pareto(points, name, more)}</div>')
            families = {p.family for p in points}
            if "ours" in families and families - NOT_PEERS:
                words.append(beaten(points, name, more))
        if not plots:
            continue
        families = dict.fromkeys(family_of(name, row) for name, row in report["methods"].items() if "reason" not in row)
        legend = "".join(f"<li>{legend_mark(f)}{escape(f)}</li>" for f in MARKS if f in families)
        lines = '<li><span class="key ours"></span>front of ours</li><li><span class="key theirs"></span>front of all others</li>'
        where = "<h4>Where a peer is better</h4><ul>" + "".join(words) + "</ul>" if words else ""
        parts.append(f"<h3>{escape(caption(file, report))}</h3>" + f'<ul class="legend">{legend}{lines}</ul><div class="plots">{"".join(plots)}</div>{where}')
    if not any(is_peers(report) for _, report in by_size(inputs)):
        parts.append(missing("Not compared with peers yet.", "peers"))
    text = "<p>Up and left is better; seconds on a log axis. Vertical bars are 95% intervals, horizontal ones the 10th to 90th percentile over batches; numbers are rows of the table below.</p>"
    return section("pareto", "Quality against seconds", text + "".join(parts))


def beaten(points: list, name: str, more: bool) -> str:
    """One line: the peers that no student is as fast as and as good as."""
    found = uncovered(points, more)
    if not found:
        return f"<li><b>{escape(name)}</b>: nowhere; for every peer some student is at least as fast and as good (fixed densities run a student's weights and are left out).</li>"
    clear, close = (", ".join(escape(p.name) for p, near in found if near is which) for which in (False, True))
    words = [f"no student is as fast and as good as {clear}."] if clear else []
    words += [f"No student's value is as good at their speed, but within the 95% intervals one is: {close}."] if close else []
    return f"<li><b>{escape(name)}</b>: {' '.join(words)}</li>"


def by_size(inputs: Inputs) -> list[tuple[str, dict]]:
    """Comparisons, the one with the most methods first."""
    return sorted(inputs.results["comparison"].items(), key=lambda item: -len(item[1]["methods"]))


def is_peers(report: dict) -> bool:
    return any("family" in row for row in report["methods"].values())


def caption(file: str, report: dict) -> str:
    """A comparison in a line."""
    kind = "Peers side by side" if is_peers(report) else "Students against the dense model" if labelled(report) else "Your own clips"
    return f"{kind}: {report.get('clips', '?')} clips ({file.rsplit('/', 1)[-1]})"


def results(inputs: Inputs) -> str:
    """A table for each comparison."""
    parts = []
    for file, report in by_size(inputs):
        qualities, rows = LABELLED if labelled(report) else UNLABELLED, []
        head = ["method", "s a clip", "speed-up", "forwards", "density", "merged", *(name.removesuffix(" accuracy") for _, name, _ in qualities), "Fréchet", "PSNR", "SSIM", "settings"]
        for index, (name, row) in enumerate(report["methods"].items(), 1):
            family = family_of(name, row)
            broken = escape(name).replace("_", "_<wbr>")
            label = f'<span class="no">{index}</span><span title="{escape(family)}">{legend_mark(family)}</span> {broken}'
            if "reason" in row:
                rows.append([label, escape(row["reason"])])
                continue
            rows.append([
                label, plain(row, "denoise_seconds", 3), f"{row.get('denoise_speedup', 1):.2f}×" if "denoise_seconds" in row else "–",
                escape(str(row.get("forwards", "–"))), plain(row, "attention_density", 3), f"{row['merged']:.0%}" if "merged" in row else "–",
                *(between(row, key, digits) for key, _, digits in qualities), between(row, "frechet_distance", 0), plain(row, "psnr", 1), plain(row, "ssim", 3),
                escape(str(row.get("settings") or report.get("checkpoints", {}).get(name, ""))),
            ])  # fmt: skip
        said = "".join(f"<li>{escape(line)}</li>" for line in (*against_dense(report), *floor_of(report)))
        parts.append(f"<h3>{escape(caption(file, report))}</h3>" + table(head, rows, "numbers") + (f"<ul>{said}</ul>" if said else ""))
    text = "<p>Density: share of the attention among the tokens that merging left which was computed in these forwards; for caches, attention calls computed. In brackets 95% intervals. PSNR and SSIM against the dense model's video of the same seed, where a method approximates it.</p>"
    return section("results", "Results", (text + "".join(parts)) if parts else missing("No comparison was found.", "comparison"))


def between(row: dict, key: str, digits: int) -> str:
    """A value with its interval."""
    if row.get(key) is None:
        return "–"
    low, high = row.get(key + "_low"), row.get(key + "_high")
    shown = digits if digits > 3 else min(digits, 2)
    interval = "" if low is None or high is None else f" <small>({low:.{shown}f}–{high:.{shown}f})</small>"
    return f"{row[key]:.{digits}f}{interval}"


def plain(row: dict, key: str, digits: int) -> str:
    return "–" if row.get(key) is None else f"{row[key]:.{digits}f}"


def axes(inputs: Inputs) -> list[str]:
    """What each axis is worth alone and together: times of `usv.bench denoise`, qualities of a comparison with the same rows."""
    head = ["method", "axes", "s a clip", "speed-up", "forwards", "s a forward", "density", "merged", "FLOPs", "overhead", "subject", "motion", "Fréchet"]
    parts = []
    for file, (report, measured) in zip(inputs.results["axes"], axes_of(inputs)):
        rows = []
        for name, row in report["methods"].items():
            quality = measured.get(name, {})
            rows.append([
                escape(name), escape(row["axes"]), f"{row['denoise_seconds']['p50'] / report['batch_size']:.3f}", f"{row['denoise_speedup']:.1f}×",
                escape(str(row["forwards"])), f"{row['seconds_per_forward']['p50'] / report['batch_size']:.4f}", f"{row['density']:.3f}", f"{row['merged']:.0%}",
                f"{row['flops_ratio']:.1f}×", f"{row['overhead']:.0%}",
                between(quality, "subject_accuracy", 3), between(quality, "motion_accuracy", 3), between(quality, "frechet_distance", 0),
            ])  # fmt: skip
        parts.append(f"<h3>Each axis alone and together ({escape(file.rsplit('/', 1)[-1])})</h3>" + table(head, rows, "numbers"))
        if together := report["interaction"]:
            parts.append(f"<p>Times: {escape(said(together))}. What attention and merging are worth is one forward's speed-up, at the same timesteps.</p>")
    return parts or [missing("The axes alone and together: not measured yet.", "axes")]


def ablations(inputs: Inputs) -> str:
    """The axes alone and together, learned against fixed policies, and patterns at equal density."""
    parts = axes(inputs)
    for file, report in inputs.results["policies"].items():
        rows = [
            [escape(policy), f"{r['velocity_error_mean']:.4f}", "–" if r["velocity_error_std"] is None else f"{r['velocity_error_std']:.4f}", f"{r['plan_cost_mean']:.3f}", "" if policy == "gumbel" else escape(str(r["learned_is_better_in"]))]
            for policy, r in report["rows"].items()
        ]  # fmt: skip
        parts.append(f"<h3>Does the learned plan pay? {escape(str(report['seeds']))} seeds ({escape(file.rsplit('/', 1)[-1])})</h3>")
        parts.append(table(["policy", "velocity error", "± over seeds", "cost of the plan", "learned is better in"], rows, "numbers"))
    if not inputs.results["policies"]:
        parts.append(missing("Learned against fixed policies: not measured yet.", "policies"))
    for file, report in inputs.results["patterns"].items():
        from usv.evaluation.compare_report import lines_of

        head, *rows = lines_of(report)
        parts.append(f"<h3>Patterns without training at equal density ({escape(file.rsplit('/', 1)[-1])})</h3>")
        parts.append(table([escape(cell) for cell in head], [[escape(cell) for cell in row] for row in rows], "numbers"))
    if not inputs.results["patterns"]:
        parts.append(missing("Patterns at equal density: not measured yet.", "patterns"))
    return section("ablations", "Ablations", "".join(parts))


def policies(inputs: Inputs) -> str:
    """Density and merging by layer and timestep, and the chosen steps, of every student."""
    parts = []
    for name, student in inputs.students.items():
        steps = ", ".join(f"{t:g}" for t in student.timesteps)
        words = f"Runs at timesteps {steps} (marked)." if steps else f"Sampled by the teacher's scheduler in {escape(str(student.steps))} steps, the same number in every column."
        pictures = "".join(f'<div class="plot"><h4>{title}</h4>{heatmap(student.plan, kind, student.timesteps)}</div>' for kind, title in (("density", "Attention density: stronger colour computes more"), ("merge", "Tokens merged: stronger colour merges more")))
        parts.append(f'<h3>{escape(name)}</h3><p>{words} {student.plan.merged():.0%} of the tokens are merged.</p><div class="plots">{pictures}</div>')
    return section("policy", "What the policy chose", "".join(parts) or missing("No student's plan was found.", "students"))


def videos(inputs: Inputs) -> str:
    """Looping clips of the same seed, side by side."""
    if not inputs.videos:
        return section("videos", "Videos", missing("No videos were found.", "videos"))
    prompts = list(dict.fromkeys((v.prompt, v.seed) for v in inputs.videos))
    shown, left = [], MOST_VIDEOS
    for prompt, seed in prompts[:MOST_PROMPTS] if any(prompt for prompt, _ in prompts) else prompts:
        group = chosen([v for v in inputs.videos if (v.prompt, v.seed) == (prompt, seed)], inputs)[:left]
        left -= len(group)
        clips = "".join(clip(video) for video in group)
        title = f"<h3>{escape(prompt)}{'' if seed is None else f' <small>seed {escape(str(seed))}</small>'}</h3>" if prompt else ""
        shown.append(f'{title}<div class="clips">{clips}</div>' if group else "")
    total, count = len(inputs.videos), MOST_VIDEOS - left
    note = f"<p>{count} of {total} clips: the dense model, students, and of each family of peers the most accurate.</p>" if count < total else ""
    return section("videos", "Videos", note + "".join(shown))


def chosen(group: list[Video], inputs: Inputs) -> list[Video]:
    """Of one prompt's videos those worth a look: everything that is no peer, and the best peer of each family."""
    rows = {name: row for _, report in reversed(by_size(inputs)) for name, row in report["methods"].items()}
    best: dict[str, tuple] = {}
    for video in group:
        row = rows.get(video.methods[0], {}) if len(video.methods) == 1 else {}
        family = row.get("family")
        if family is not None and family not in ("dense", "ours"):
            best[family] = max(best.get(family, (-1, 0, "")), (row.get("subject_accuracy") or 0, -(row.get("denoise_seconds") or 0), str(video.path)))
    peers = {path for *_, path in best.values()}
    known = {name for name, row in rows.items() if row.get("family") not in (None, "dense", "ours")}
    return [v for v in group if len(v.methods) != 1 or v.methods[0] not in known or str(v.path) in peers]


def clip(video: Video) -> str:
    """One looping mp4 as a data URI."""
    data = base64.b64encode(video.path.read_bytes()).decode()
    name = " | ".join(video.methods) or video.path.stem
    kind = ' class="wide"' if len(video.methods) > 1 or not video.methods else ""
    return (
        f'<figure{kind}><video muted autoplay loop playsinline preload="auto" aria-label="{escape(f"{name}: {video.prompt}")}" '
        f'src="data:video/mp4;base64,{data}"></video><figcaption>{escape(name)}</figcaption></figure>'
    )


def training(inputs: Inputs) -> str:
    """Losses and sparsity over steps of every log."""
    parts = []
    for file, rows in inputs.curves.items():
        x = "step" if any("step" in row for row in rows) else "clips"
        losses = series(rows, x, lambda k: k.startswith("loss/") or k in ("loss", "validation/velocity_error"), log=True)
        sparse = series(rows, x, lambda k: k in ("sparsity/density", "sparsity/merged", "sparsity/cost", "sparsity/target_cost"))
        pictures = [
            f'<div class="plot">{key(found)}{curves(found, f"{title} of {file}", x, title, log)}</div>'
            for found, title, log in ((losses, "loss", True), (sparse, "sparsity", False))
            if found
        ]
        if pictures:
            parts.append(f'<h3><code>{escape(file)}</code></h3><div class="plots">{"".join(pictures)}</div>')
    return section("training", "Training", "".join(parts) or missing("No training log was found.", "curves"))


def series(rows: list[dict], x: str, wanted, log: bool = False) -> dict[str, list[tuple[float, float]]]:
    """{name: points} of the numbers whose name is wanted, by the last run: a log goes on where it was cut off."""
    names = dict.fromkeys(k for row in rows for k in row if wanted(k))
    found = {name: sorted({row[x]: row[name] for row in rows if drawable(row.get(x), False) and drawable(row.get(name), log)}.items()) for name in names}
    return {name: points for name, points in found.items() if points}


def drawable(value, log: bool) -> bool:
    return isinstance(value, int | float) and abs(value) < 1e30 and (value > 0 or not log)  # which NaN is not


def key(names) -> str:
    """A legend of coloured lines."""
    return '<ul class="legend">' + "".join(f'<li><span class="key s{i % SERIES}"></span>{escape(n)}</li>' for i, n in enumerate(names)) + "</ul>"


def kernels(inputs: Inputs) -> str:
    """Speed of the attention kernel, and share of the ideal."""
    parts = []
    for file, report in inputs.results["kernels"].items():
        rows = [r for r in report["rows"] if {"speedup_over_sdpa", "density", "pass", "dtype", "S", "D"} <= set(r)]
        if not rows:
            continue
        cells = [[escape(f"{r['pass']}, {r['dtype']}"), escape(str(r["S"])), escape(str(r["D"])), f"{r['density']:g}", f"{r['speedup_over_sdpa']:.2f}×", f"{r['speedup_over_sdpa'] * r['density']:.0%}", *(f"{r['times'][side]['median_ms']:.1f}" if side in r.get("times", {}) else "–" for side in ("ours", "sdpa_dense", "flex"))] for r in rows]  # fmt: skip
        parts.append(f"<h3>{escape(file.rsplit('/', 1)[-1])}: {escape(environment(report))}</h3>")
        parts.append(f'<div class="plots"><div class="plot"><ul class="legend"><li><span class="key bar"></span>measured</li><li><span class="key ideal"></span>ideal, 1 / density</li></ul>{speed_bars(rows)}</div></div>')
        parts.append(table(["pass", "S", "D", "density", "over dense SDPA", "of ideal", "ours, ms", "dense SDPA, ms", "FlexAttention, ms"], cells, "numbers"))
        if gates := {kind: errors for kind, errors in report["gate"].items() if isinstance(errors, dict)}:
            words = "; ".join(f"{escape(kind)}: " + ", ".join(f"{escape(k)} {v:.2g}" for k, v in errors.items()) for kind, errors in gates.items())
            parts.append(f"<p>Error against fp64 before anything was timed, of its norm: {words}.</p>")
    return section("kernels", "Kernels", "".join(parts) or missing("Kernels were not timed.", "kernels"))


SECTIONS = (what_was_run, fronts, results, ablations, policies, videos, training, kernels)
CLASSES = tuple(css(family) for family in MARKS)
