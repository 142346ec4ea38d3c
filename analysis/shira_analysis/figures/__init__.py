"""Pictures of adapters, and the numbers in them.

Each module computes the numbers, without matplotlib, and has a ``draw_...`` function that draws them on the caller's matplotlib
Axes (in a notebook, or of :func:`shira_analysis.figures.style.figure`) and returns it.
"""
