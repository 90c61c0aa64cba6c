"""What `python -m usv.oracle_inputs` types: usv.evaluation.oracle_inputs."""

from usv.evaluation.oracle_inputs import main

if __name__ == "__main__":
    main()
