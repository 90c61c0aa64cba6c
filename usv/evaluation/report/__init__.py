"""One self-contained HTML page of what was measured: `python -m usv.report`.

Rooms: `inputs` (what is read) · `front` (who is better than whom) · `svg`, `plots` (pictures) · `sections`, `page` (HTML).
"""
