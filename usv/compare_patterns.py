"""What `python -m usv.compare_patterns` types: usv.evaluation.compare_patterns."""

from usv.evaluation.compare_patterns import main

if __name__ == "__main__":
    main()
