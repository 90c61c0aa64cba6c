"""What `python -m usv.oracle` types: usv.evaluation.oracle."""

from usv.evaluation.oracle import main

if __name__ == "__main__":
    main()
