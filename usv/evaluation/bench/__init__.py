"""Measurements of speed and memory: `python -m usv.bench forward | denoise | train | wan-1.3b | memory`.

Every command measures both sides in one run, alternately, after a warm-up; reports quantiles over the repetitions and the
density that was executed; and writes JSON with device, threads, versions, load, commit and command.
"""
