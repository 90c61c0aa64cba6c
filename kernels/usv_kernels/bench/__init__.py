"""Correctness-gated micro-benchmarks, `python -m usv_kernels.bench`; nothing imports them back."""
