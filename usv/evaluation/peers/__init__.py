"""Peers side by side with this project's students, on the same prompts and seeds, in one run: `python -m usv.peers`.

Rooms: `methods` (what is compared) · `caches` (feature caches of diffusers and cache-dit) · `run` (interleaved batches, rows).
"""
