"""The README's tables, made from results: each replaces the table that begins with the same line."""

from __future__ import annotations

from pathlib import Path

from usv.evaluation import judge
from usv.evaluation.bench import denoise
from usv.evaluation.peers import __main__ as peers
from usv.evaluation.report.inputs import Inputs, axes_of

TABLES = {"usv_mini.json": judge.markdown, "peers.json": peers.markdown}  # in data/results


def tables(inputs: Inputs) -> list[str]:
    """The tables of the results that a README shows, as Markdown; one that cannot be made is a problem in words."""
    reports = inputs.results["comparison"].items()
    wanted = [(file, TABLES[Path(file).name], (report,)) for file, report in reports if Path(file).name in TABLES]
    wanted += [("the axes", denoise.markdown, pair) for pair in axes_of(inputs)]
    found = []
    for file, make, of in wanted:
        try:
            found.append(make(*of))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            inputs.problems.append(f"{file}: no table for a README ({type(error).__name__}: {error})")
    return found


def refreshed(text: str, table: str) -> str:
    """`text` with the rows of `table` in place of those under the same heading; unchanged where there is no such heading."""
    lines, heading = text.split("\n"), table.split("\n")[0]
    if heading not in lines:
        return text
    begin = end = lines.index(heading)
    while end < len(lines) and lines[end].startswith("|"):
        end += 1
    return "\n".join([*lines[:begin], *table.split("\n"), *lines[end:]])
