"""Planning grows with the number of files, not with its square, and looks at each file once."""

import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import tiny

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "data"))

import looking  # noqa: E402
import prepare  # noqa: E402
import sources  # noqa: E402


def test_a_folder_a_clip():
    """2,000 folders of five clips: one of pictures is found among them; comparing every file with every folder took 15 s of CPU."""
    root = Path("/videos")
    folders = [root / f"d{i:04d}" for i in range(2000)]
    files = [folder / f"clip{k}.mp4" for folder in folders for k in range(5)]
    files += [root / "frames" / f"{k:03d}.png" for k in range(4)]
    begun = time.process_time()
    [found] = sources._folders_of_frames(root, [root, root / "frames", *folders], files)
    assert time.process_time() - begun < 2
    assert found["file"] == "frames" and "a folder of 4 pictures" in found["reason"]


@pytest.mark.parametrize("buckets", [(), ((32, 32), (32, 48), (48, 32))])
def test_every_file_is_looked_at_once(buckets, tiny_wan, tmp_path, monkeypatch):
    """For all sizes together; a second run, with all plans there, looks at none."""
    import av
    import numpy as np

    for number in range(3):
        path = tmp_path / "videos" / f"{number}.mp4"
        path.parent.mkdir(exist_ok=True)
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=8)
            stream.width, stream.pix_fmt = 64, "yuv420p"
            stream.height = 48 if number else 64
            for level in range(0, 240, 24):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((stream.height, 64, 3), level, np.uint8), format="rgb24")))
            container.mux(stream.encode())
    seen, original = Counter(), looking.look_at_file
    monkeypatch.setattr(looking, "look_at_file", lambda path, scenes=False: (seen.update([path.name]), original(path, scenes))[1])
    settings = prepare.Settings(tiny_wan, tmp_path / "out", 32, 32, tiny.FRAMES, 8, tiny.TEXT, videos=tmp_path / "videos", caption="a clip", buckets=buckets)
    index = prepare.run(settings)
    assert seen == {f"{number}.mp4": 1 for number in range(3)}
    assert sum(part["num_samples"] for part in index["splits"].values()) == 6 and len(index["splits"]) == (2 if buckets else 1)
    prepare.run(settings)
    assert sum(seen.values()) == 3 * (2 if buckets else 1)  # of a size that no clip has there is no plan: it is looked for again
