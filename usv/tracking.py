"""Logging for the roof: wandb when asked for (offline without an account), always a jsonl beside the checkpoints."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path


class Tracker:
    """Scalars to `metrics.jsonl` and to wandb; heatmaps and videos to wandb."""

    def __init__(self, logger, output_dir: Path, config: dict, name: str):
        self.file = open(output_dir / "metrics.jsonl", "a")
        self.run = None
        if logger.name == "wandb":
            import wandb

            mode = logger.mode
            if mode == "auto":
                mode = "online" if os.environ.get("WANDB_API_KEY") or Path("~/.netrc").expanduser().exists() else "offline"
            identity = output_dir / "wandb_id"
            if not identity.exists():
                identity.write_text(uuid.uuid4().hex[:12])
            self.run = wandb.init(
                project=logger.project, name=name, dir=str(output_dir), mode=mode, config=config, resume="allow",
                id=identity.read_text(), settings=wandb.Settings(silent=True),
            )  # fmt: skip

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
        import wandb
        from matplotlib import pyplot

        figure, axis = pyplot.subplots(figsize=(4, 3))
        picture = axis.imshow(table, aspect="auto", cmap="viridis", vmin=0, vmax=1)
        axis.set_xlabel(columns)
        axis.set_ylabel(rows)
        figure.colorbar(picture)
        self.run.log({name: wandb.Image(figure)}, step=step)
        pyplot.close(figure)

    def video(self, step: int, name: str, path: Path, caption: str) -> None:
        if self.run is not None:
            import wandb

            self.run.log({name: wandb.Video(str(path), caption=caption, format="mp4")}, step=step)

    def close(self) -> None:
        self.file.close()
        if self.run is not None:
            self.run.finish()


class Silent:
    """The tracker of every rank but the first: one process writes a run."""

    def scalars(self, *_) -> None:
        pass

    heatmap = video = scalars

    def close(self) -> None:
        pass
