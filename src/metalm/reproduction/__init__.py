"""The paper's claims tried in small, on real data: arms, their queue, and the report."""
