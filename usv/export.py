"""What `python -m usv.export` types: usv.sampling.export."""

import sys

from usv.sampling.export import main

if __name__ == "__main__":
    sys.exit(main())
