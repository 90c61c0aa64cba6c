"""What `python -m usv.peers` types: usv.evaluation.peers.__main__."""

from usv.evaluation.peers.__main__ import main

if __name__ == "__main__":
    main()
