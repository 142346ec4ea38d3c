"""Fuzzing: files, streams, names, interruptions and threads at random against the promises of `docs/security.md`."""
