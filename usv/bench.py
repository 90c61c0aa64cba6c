"""What `python -m usv.bench` types: usv.evaluation.bench.__main__."""

from usv.evaluation.bench.__main__ import main

if __name__ == "__main__":
    main()
