"""docs/studio.png, of the page as a browser shows it: `python tests/studio_picture.py docs/studio.png` on a quiet machine, since seconds are in it."""

import os
import sys
import tempfile
import time
from functools import lru_cache
from pathlib import Path

import tiny
from browser import Browser

sys.path[:0] = [str(tiny.ROOT), str(tiny.ROOT / "tests" / "evaluation")]

PROMPT, SEED, BUDGET = "a cat, the camera pans left", 0, 0.4


def main(out: Path) -> None:
    from test_studio import SET_BUDGET, wait

    from usv.evaluation.studio.__main__ import CKPT, MODEL
    from usv.evaluation.studio.page import serve
    from usv.evaluation.studio.stage import Stage

    out = out.resolve()
    os.chdir(tiny.ROOT)  # the page names its model as it was given
    stage = Stage.open(CKPT, MODEL)
    stage.sparse = lru_cache(stage.sparse)  # made before the browser draws: it takes a share of the cores
    stage.dense(PROMPT, SEED), stage.sparse(PROMPT, SEED, BUDGET)
    page, address = serve(stage, block=False)
    with tempfile.TemporaryDirectory() as profile:
        shown = Browser(profile)
        try:
            shown.open(address, width=1280)
            wait(shown, "document.querySelectorAll('#plan svg').length == 2 && document.querySelector('input[type=range]')")
            shown.run(SET_BUDGET.format(BUDGET))
            time.sleep(2)  # the page hears of the slider
            shown.run("[...document.querySelectorAll('button')].find(b => b.textContent.includes('Make the clips')).click()")
            wait(shown, "[...document.querySelectorAll('#clips video')].filter(v => v.readyState == 4 && v.videoWidth > 0).length == 2")
            time.sleep(3)  # what moves on the page has come to rest
            shown.screenshot(out)
        finally:
            shown.close()
            page.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
