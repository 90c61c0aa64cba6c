"""One training run: its ranks and engine, data, checkpoints, validation and log. accelerate and DeepSpeed are known here."""
