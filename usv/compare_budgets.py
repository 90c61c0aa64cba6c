"""What `python -m usv.compare_budgets` types: usv.evaluation.compare_budgets."""

from usv.evaluation.compare_budgets import main

if __name__ == "__main__":
    main()
