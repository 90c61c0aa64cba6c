"""What `python -m usv.decoder` types: usv.training.decoder."""

from usv.training.decoder import main

if __name__ == "__main__":
    main()
