"""The figures of a run, and the sinks that show them: see README.md."""
