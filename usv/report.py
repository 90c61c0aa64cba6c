"""What `python -m usv.report` types: usv.evaluation.report.__main__."""

from usv.evaluation.report.__main__ import main

if __name__ == "__main__":
    main()
