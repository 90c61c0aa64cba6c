"""One self-contained HTML page of what was measured, for a browser, a mail or a phone.

    python -m usv.report
    python -m usv.report --videos outputs/videos --student usv_mini=outputs/usv_mini/student --out outputs/report.html
    python -m usv.report --readme README.md --picture docs/pareto.svg=peers.json:subject_accuracy   # and the README's tables and a picture

It reads data/results/*.json, the plans of students, training logs and folders of mp4s, computes nothing anew, and needs no
network to be read. A section without its input says which command makes it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from usv.evaluation.report.front import QUALITIES, points_of
from usv.evaluation.report.inputs import Inputs, gather
from usv.evaluation.report.page import page, picture, usable
from usv.evaluation.report.readme import refreshed, tables
from usv.files import FileError, check_output, write_text
from usv.sampling.checkpoint import named
from usv.training.run import commit

ROOT = Path(__file__).resolve().parents[3]


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m usv.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--results", type=Path, nargs="+", help="JSON files; default data/results/*.json")
    parser.add_argument("--student", action="append", help="[name=]student folder; default data/students/* and outputs/*/student")
    parser.add_argument("--curves", type=Path, nargs="+", help="metrics.jsonl files; default those of the students and outputs/*")
    parser.add_argument("--videos", type=Path, action="append", default=[], help="folder of mp4s; repeat for several")
    parser.add_argument("--out", type=Path, default=Path("outputs/report.html"))
    parser.add_argument("--readme", type=Path, help="replace the tables of this file by those of the results")
    parser.add_argument("--picture", type=drawn, action="append", default=[], metavar="FILE.svg=RESULT.json:QUALITY",
                        help=f"write a Pareto plot as a file of its own; QUALITY: {', '.join(QUALITIES)}; repeat for several")  # fmt: skip
    return parser.parse_args(words)


def drawn(words: str) -> tuple[Path, str, str]:
    """File, name of a result and quality of a --picture."""
    file, _, source = words.partition("=")
    result, _, key = source.rpartition(":")
    if not file or not result or key not in QUALITIES:
        raise argparse.ArgumentTypeError(f"got {words!r}, accepted: FILE.svg=RESULT.json:QUALITY with QUALITY one of {', '.join(QUALITIES)}")
    return Path(file), result, key


def short(path: Path) -> Path:
    """Relative to the repository or the current folder where it lies inside."""
    for root in (Path.cwd(), ROOT):
        if path.is_absolute() and path.is_relative_to(root):
            return path.relative_to(root)
    return path


def defaults(args: argparse.Namespace) -> tuple[list[Path], dict[str, Path], list[Path]]:
    """Results, students and logs, as given or found."""
    results = args.results or sorted((ROOT / "data" / "results").glob("*.json"))
    if args.student is None:
        shipped = {p.parent.name: p.parent for p in sorted((ROOT / "data" / "students").glob("*/config.json"))}
        trained = {p.parent.parent.name: p.parent for p in sorted((ROOT / "outputs").glob("*/student/config.json"))}
        students = trained | shipped
    else:
        students = {name: Path(path) for name, path in named(args.student).items()}
    if args.curves is None:
        beside = [folder / name for folder in students.values() for name in ("metrics.jsonl", "../metrics.jsonl")]
        logs = [p.resolve() for p in beside] + sorted((ROOT / "outputs").glob("*/metrics.jsonl"))
        curves = list(dict.fromkeys(p for p in logs if p.exists()))
    else:
        curves = args.curves
    return [short(p) for p in results], {n: short(p) for n, p in students.items()}, [short(p) for p in curves]


def check(args: argparse.Namespace) -> None:
    """FileError where a file that was named is not there, or the page cannot be written."""
    students = named(args.student or []).values()
    for option, paths in (("--results", args.results), ("--curves", args.curves), ("--videos", args.videos), ("--student", map(Path, students)), ("--readme", [args.readme])):
        for path in paths or ():
            if path is not None and not path.exists():
                raise FileError(f"{option}: got {path}, which does not exist; nothing was written")
    check_output(args.out, begins=("<!doctype html",))
    for file, *_ in args.picture:
        check_output(file, "--picture", ("<svg",))


def main(words: list[str] | None = None) -> Path:
    args = parse(words)
    try:
        check(args)
        inputs = gather(*defaults(args), args.videos)
        return published(args, inputs, words)
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


def published(args: argparse.Namespace, inputs: Inputs, words: list[str] | None) -> Path:
    """The page and all else that was asked for."""
    inputs = usable(inputs)
    command = "python -m usv.report " + " ".join(sys.argv[1:] if words is None else words)
    text = page(inputs, command.strip(), commit())
    write_text(args.out, text)
    if args.readme is not None:
        said = args.readme.read_text()
        for table in tables(inputs):
            said = refreshed(said, table)
        write_text(args.readme, said)
    for file, name, key in args.picture:
        report = next((r for path, r in inputs.results["comparison"].items() if Path(path).name == name), None)
        if report is None or not points_of(report, key):
            missing = "no such comparison among the results" if report is None else f"no row has {key}"
            inputs.problems.append(f"{name}: {missing}, {file} is not drawn")
        else:
            write_text(file, picture(report, key))
    for problem in inputs.problems:
        print(f"not read: {problem}")
    print(f"{args.out} ({len(text) / 2**20:.1f} MiB)")
    return args.out
