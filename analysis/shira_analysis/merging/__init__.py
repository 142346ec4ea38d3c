"""Report on a merge before and after it is made, and check of a merged checkpoint."""
