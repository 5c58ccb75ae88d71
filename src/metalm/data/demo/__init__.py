"""Demo data made on the spot: text of the running Python's standard library, and captioned drawings."""
