"""How samples are shown: a caption under its image or beside its clip, a continuation under its text."""

from __future__ import annotations

from metalm.evaluation.generation import Sample
from metalm.modalities import MEDIA
from metalm.training.monitor.sink import Sink


class SamplesShown:
    """Shows samples in a sink."""

    def __init__(self, sink: Sink) -> None:
        """Stand by."""
        self._sink = sink
        self._shown: set[str] = set()

    def show(self, step: int, samples: list[Sample]) -> None:
        """Show captions and continuations; the captions of a source also as one text."""
        captions: dict[str, list[str]] = {}
        for number, sample in enumerate(samples):
            tag = f"{sample.source}/{number}"
            if sample.media is None:
                self._sink.write_text(
                    step, tag, f"TEXT\n\n{sample.reference}\n\nCONTINUED\n\n{sample.generated}"
                )
                continue
            lines = [f"asked: {sample.asked}"] if sample.asked else []
            lines += [f"generated: {sample.generated}", f"reference: {sample.reference}"]
            modality = MEDIA[sample.modality]
            modality.show(self._sink, step, tag, sample.media, lines, first=tag not in self._shown)
            self._shown.add(tag)
            captions.setdefault(sample.source, []).append("\n".join([f"{modality.noun} {number}", *lines]))
        for source, entries in captions.items():
            self._sink.write_text(step, f"captions/{source}", "\n\n".join(entries))
