"""The paper's claims tried at small scale on public data."""
