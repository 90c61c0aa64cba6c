"""Logging for the roof: wandb (offline without an account) or trackio where asked for, always a jsonl beside the checkpoints."""

from __future__ import annotations

import json
import netrc
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from usv.files import write_text


def has_account() -> bool:
    """Whether wandb finds a key: in the environment, or what `wandb login` left in ~/.netrc, among the keys of other services."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc(Path("~/.netrc").expanduser()).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class Tracker:
    """Scalars to `metrics.jsonl` and to a board; heatmaps, videos and tables to the board.

    board: the module wandb, or trackio, which speaks the same words and keeps everything on this machine. One run has one
    identity, kept in its folder, so that a resumed one goes on in the same place.
    """

    def __init__(self, logger, output_dir: Path, config: dict, name: str, begun: int | None = None):
        """begun: the step after which this run logs; later ones of a run that was cut off come again. None keeps all."""
        mend(output_dir / "metrics.jsonl", begun)
        self.file = open(output_dir / "metrics.jsonl", "a")
        self.run = self.board = None
        if logger.name == "none":
            return
        identity = output_dir / "wandb_id"
        if not identity.exists():
            write_text(identity, uuid.uuid4().hex[:12])
        if logger.name == "trackio":
            import trackio as board

            name = f"{name}-{identity.read_text()}"  # trackio knows runs by their names
            self.run = board.init(project=logger.project, name=name, config=config, resume="allow", embed=False)
        else:
            import wandb as board

            mode = logger.mode
            if mode == "auto":
                mode = "online" if has_account() else "offline"
            self.run = board.init(
                project=logger.project, name=name, dir=str(output_dir), mode=mode, config=config, resume="allow",
                id=identity.read_text(), settings=board.Settings(silent=True),
            )  # fmt: skip
        self.board = board

    def scalars(self, step: int, values: dict[str, float]) -> None:
        values = {name: float(value) for name, value in values.items() if value is not None}
        self.file.write(json.dumps({"step": step, **{k: round(v, 6) for k, v in values.items()}}) + "\n")
        self.file.flush()
        if self.run is not None:
            self.run.log(values, step=step)

    def heatmap(self, step: int, name: str, table, rows: str, columns: str) -> None:
        """A layer × timestep picture; table (rows, columns)."""
        if self.run is None:
            return
        import matplotlib

        matplotlib.use("Agg")
        import numpy
        from matplotlib import pyplot

        figure, axis = pyplot.subplots(figsize=(4, 3), constrained_layout=True)
        picture = axis.imshow(table, aspect="auto", cmap="viridis", vmin=0, vmax=1)
        axis.set_xlabel(columns)
        axis.set_ylabel(rows)
        figure.colorbar(picture)
        figure.canvas.draw()
        pixels = numpy.asarray(figure.canvas.buffer_rgba())[..., :3].copy()
        self.run.log({name: self.board.Image(pixels)}, step=step)
        pyplot.close(figure)

    def video(self, step: int, name: str, path: Path, caption: str) -> None:
        if self.run is not None:
            self.run.log({name: self.board.Video(str(path), caption=caption, format="mp4")}, step=step)

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence]) -> None:
        """Rows of text, numbers, and videos given as paths of mp4s."""
        if self.run is not None:
            cell = lambda value: self.board.Video(str(value), format="mp4") if isinstance(value, Path) else value  # noqa: E731
            data = [[cell(value) for value in row] for row in rows]
            self.run.log({name: self.board.Table(columns=list(columns), data=data)}, step=step)

    def close(self) -> None:
        self.file.close()
        if self.run is not None:
            self.run.finish()


def mend(path: Path, begun: int | None) -> None:
    """Leave out of a log the half line that a kill left, and what follows step `begun`; a log of another beginning is set aside."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return
    steps = [(step_of(line), line) for line in lines]
    whole = [line for step, line in steps if step is not None]
    kept = whole if begun is None else [line for step, line in steps if step is not None and step <= begun]
    if begun == 0 and whole:
        os.replace(path, path.with_name(f"metrics-{int(path.stat().st_mtime)}.jsonl"))
    elif kept != lines or not path.read_bytes().endswith(b"\n"):
        write_text(path, "".join(f"{line}\n" for line in kept))


def step_of(line: str) -> float | None:
    """The step of a line of the log; None of what is no line of it."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None


class Silent:
    """The tracker of every rank but the first: one process writes a run."""

    def scalars(self, *_) -> None:
        pass

    heatmap = video = table = scalars

    def close(self) -> None:
        pass
