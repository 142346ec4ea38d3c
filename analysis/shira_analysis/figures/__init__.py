"""Pictures of adapters, and the numbers in them.

Each module has two halves: what is shown, as plain numbers that need no matplotlib, and a ``draw_...`` function that puts them
on a matplotlib Axes of the caller's (in a notebook, or of :func:`shira_analysis.figures.style.figure`) and returns it.
"""
