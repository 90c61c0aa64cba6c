"""What `python -m usv.evaluate` types: usv.evaluation.evaluate."""

from usv.evaluation.evaluate import main

if __name__ == "__main__":
    main()
