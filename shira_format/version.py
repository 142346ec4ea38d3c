"""The version of the packages, in one place."""

__version__ = "0.1.0"
