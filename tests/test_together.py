"""docs/together.md: its quick rows, run again; none of its cells is wrong or missing."""

from pathlib import Path

import pytest
import together
from treatments import Row, on

PAGE = (Path(__file__).parents[1] / "docs" / "together.md").read_text().splitlines()
QUICK = [row for row in together.ROWS if row.quick]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return together.Bench(tmp_path_factory.mktemp("together"))


@pytest.mark.parametrize("row", QUICK, ids=lambda row: row.name)
def test_row(bench, row):
    assert together.line(row, [together.cell(bench, row, column) for column in together.COLUMNS]) in PAGE, "python tests/together.py > docs/together.md"


def test_every_row_is_there_and_has_been_run():
    cells_of = PAGE[: next((i for i, line in enumerate(PAGE) if "A router on Wan-mini" in line), None)]
    found = [line.removesuffix(" |").split(" | ") for line in cells_of if line.startswith("| ")][1:]
    assert [cells[0] for cells in found] == [together.line(row, []).split(" | ")[0] for row in together.ROWS]
    for row, cells in zip(together.ROWS, found):
        assert len(cells) == 1 + len(together.COLUMNS)
        for cell in cells[1:]:
            assert cell.startswith(("same (", "refused: ", "*before* ")) or row.needs == "bitsandbytes" and cell.startswith("not run: "), cell


def test_the_routers_figures_are_those_that_were_measured():
    section = together.router_section()
    assert section in "\n".join(PAGE) + "\n" and bool(section) == any("A router on Wan-mini" in line for line in PAGE), "python tests/together.py > docs/together.md"


def test_a_wrong_cell_fails(bench):
    """Something done to a pipeline that a student does not see."""
    def warp(pipe):
        if not hasattr(pipe, "_usv"):
            pipe.transformer.blocks[0].attn1.to_v.weight.data *= 1.5

    for column in ("student", "few-step student"):
        with pytest.raises(AssertionError, match="WRONG: warp"):
            together.cell(bench, Row("warp", on(warp), moves=False), column)
