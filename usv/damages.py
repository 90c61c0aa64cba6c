"""What `python -m usv.damages` types: usv.evaluation.oracle_terminal."""

from usv.evaluation.oracle_terminal import main

if __name__ == "__main__":
    main()
