"""A report of `usv.compare_patterns` as a table and as a plot."""

from __future__ import annotations

from pathlib import Path

COLUMNS = (
    ("PSNR", "psnr", "{:.2f}"), ("SSIM", "ssim", "{:.4f}"), ("LPIPS-like", "lpips_like", "{:.4f}"),
    ("Fréchet", "frechet_distance", "{:.1f}"), ("subject", "subject_accuracy", "{:.3f}"), ("motion", "motion_accuracy", "{:.3f}"),
)  # fmt: skip
STAGES = (("profile", "profile"), ("cluster", "cluster"), ("permute", "permute"), ("attention", "attention"), ("total", "total"))
HEAD = ("method", "executed", "recall", *(title for title, *_ in COLUMNS), *(f"{title} s" for title, _ in STAGES))


def _cells(row: dict) -> list[str]:
    quality = ["–" if row.get(key) is None else form.format(row[key]) for _, key, form in COLUMNS]
    seconds = [f"{row['seconds'][key]:.2f}" if key in row["seconds"] else "–" for _, key in STAGES]
    return [*quality, *seconds]


def lines_of(report: dict) -> list[tuple[str, ...]]:
    """Rows of text, the first the heading; densities descending, methods in the order they ran. * marks a missed density."""
    lines = [HEAD]
    if report["dense"] is not None:
        lines.append(("dense", "1.000", "–", *_cells(report["dense"])))
    for row in sorted(report["rows"], key=lambda row: -row["wanted"]):
        executed = f"{row['executed']:.3f}" + ("" if row["matched"] else "*")
        recall = "–" if row["recall"] is None else f"{row['recall']:.3f}"
        lines.append((row["method"], executed, recall, *_cells(row)))
    return lines


def claims(report: dict) -> list[str]:
    """For each density, whether SVG2 keeps at least the attention mass that SVG keeps."""
    found = {(row["wanted"], row["method"]): row for row in report["rows"]}
    lines = []
    for wanted in sorted({wanted for wanted, _ in found}, reverse=True):
        pair = [found.get((wanted, name)) for name in ("svg2", "svg")]
        if all(row is not None and row["recall"] is not None for row in pair):
            two, one = (row["recall"] for row in pair)
            lines.append(f"density {wanted}: recall of SVG2 {two:.3f} {'≥' if two >= one else '<'} {one:.3f} of SVG")
    return lines


def table(report: dict) -> str:
    """For a terminal."""
    lines = lines_of(report)
    widths = [max(len(line[i]) for line in lines) + 2 for i in range(len(HEAD))]
    text = ["".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in lines]
    return "\n".join([*text, *claims(report)])


def markdown(report: dict) -> str:
    """For a document, with the conditions of the run in a line above."""
    s, lines = report["settings"], lines_of(report)
    conditions = (
        f"{s['clips']} clips, {s['steps']} steps, guidance {s['guidance']:g}, first {s['dense_steps']:.0%} of the steps and "
        f"{s['dense_layers']:.0%} of the layers dense for all; executed density of the sparse calls (* more than 5% off), seconds a "
        f"clip on {report['machine']['device']}, {report['machine']['threads']} threads, commit {report['commit']}."
    )
    text = ["| " + " | ".join(line) + " |" for line in lines]
    rule = "|" + "---|" * len(HEAD)
    return "\n".join([conditions, "", text[0], rule, *text[1:], "", *(f"* {claim}" for claim in claims(report)), ""])


def plot(report: dict, path: Path) -> None:
    """PSNR against the dense twins and attention recall, each over executed density, one line a method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for axis, key, title in zip(axes, ("psnr", "recall"), ("PSNR against dense, dB", "attention recall")):
        for name in dict.fromkeys(row["method"] for row in report["rows"]):
            points = sorted((r["executed"], r[key]) for r in report["rows"] if r["method"] == name and r.get(key) is not None)
            axis.plot(*zip(*points), marker="o", label=name) if points else None
        axis.set_xlabel("executed density of the sparse calls")
        axis.set_ylabel(title)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def publish(report: dict, out: Path) -> None:
    """The table as .md and the plot as .png beside the JSON `out`."""
    out.with_suffix(".md").write_text(markdown(report))
    plot(report, out.with_suffix(".png"))
