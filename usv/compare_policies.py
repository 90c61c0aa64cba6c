"""What `python -m usv.compare_policies` types: usv.evaluation.compare_policies."""

from usv.evaluation.compare_policies import main

if __name__ == "__main__":
    main()
