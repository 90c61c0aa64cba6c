"""What `python -m usv.studio` types: usv.evaluation.studio.__main__."""

from usv.evaluation.studio.__main__ import main

if __name__ == "__main__":
    main()
