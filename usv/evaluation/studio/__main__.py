"""Type a prompt, move the budget, see dense | student side by side with seconds, executed density and the plan, on this machine only.

    python -m usv.studio                                                      # the dial that ships, on the embedded model
    python -m usv.studio --ckpt outputs/mine/student --model FOLDER --port 7861

The page is served to 127.0.0.1 and asks nothing of the network. Needs the extra `studio`: pip install -e ".[studio]".
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys

CKPT, MODEL, PORT = "data/students/usv_dial", "data/wan-mini", 7860


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", default=CKPT, help="student folder; one that carries damages can be given any budget in its range")
    parser.add_argument("--model", default=MODEL, help="diffusers folder or hub id, or a name of conf/model, e.g. wan_1_3b")
    parser.add_argument("--port", type=int, default=PORT, help="of 127.0.0.1; 0: any that is free")
    args = parser.parse_args()
    if importlib.util.find_spec("gradio") is None:  # before anything is loaded
        sys.exit('usv.studio: needs gradio, which is not installed; pip install -e ".[studio]"')
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported
    if not 0 <= args.port <= 65_535:
        sys.exit(f"--port: got {args.port}, accepted: 0 to 65535")
    from usv.cpu import keep_freed_memory
    from usv.evaluation.studio.page import serve
    from usv.evaluation.studio.stage import Stage

    keep_freed_memory()
    try:
        serve(Stage.open(args.ckpt, args.model), args.port)
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
