"""What every room stands on: arrays, dtypes, rounding, compiled loops, threads, optional imports, text."""
