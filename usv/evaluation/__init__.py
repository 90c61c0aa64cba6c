"""Measurements, each a command `python -m usv.NAME`; nothing imports them."""
