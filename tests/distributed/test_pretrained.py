"""ZeRO 3 shards encoders of transformers over all ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from distributed.ranks import run_ranks
from reference.pretrained import save_pretrained


def test_what_a_rank_holds_falls_with_the_ranks(tmp_path: Path) -> None:
    """Frozen and trained weights alike."""
    model = save_pretrained("vit", tmp_path, image_size=8, patch_size=4)
    whole = sum(p.nbytes for name, p in model.named_parameters() if not name.startswith("pooler."))
    for num_ranks in (1, 4):
        results = run_ranks("measure_pretrained", num_ranks, str(tmp_path))
        assert len(results) == num_ranks
        for result in results:
            assert result["held"] == pytest.approx(whole / num_ranks, rel=0.02)
