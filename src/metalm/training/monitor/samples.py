"""How samples are shown: a caption under its image or beside its clip, a continuation under its text."""

from __future__ import annotations

from metalm.data.audio import Clip, resample
from metalm.data.pictures import caption_picture
from metalm.training.evaluate import Sample
from metalm.training.monitor.sink import Sink

LISTENED_SECONDS, LISTENED_HERTZ = 30, 16_000
"""What people are given to hear of a clip, at most."""


class SamplesShown:
    """Shows samples in a sink; a clip once in a process: it stays the same, and is large."""

    def __init__(self, sink: Sink) -> None:
        """Stand by."""
        self._sink = sink
        self._heard: set[str] = set()

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
            lines = [f"generated: {sample.generated}", f"reference: {sample.reference}"]
            if isinstance(sample.media, Clip):
                kind = "clip"
                self._show_clip(step, tag, sample.media)
            else:
                kind = "image"
                self._sink.write_picture(step, tag, caption_picture(sample.media, lines))
            captions.setdefault(sample.source, []).append("\n".join([f"{kind} {number}", *lines]))
        for source, entries in captions.items():
            self._sink.write_text(step, f"captions/{source}", "\n\n".join(entries))

    def _show_clip(self, step: int, tag: str, clip: Clip) -> None:
        if tag not in self._heard:
            self._heard.add(tag)
            heard = resample(clip, min(clip.sampling_rate, LISTENED_HERTZ))
            samples = heard.samples[: round(LISTENED_SECONDS * heard.sampling_rate)]
            self._sink.write_audio(step, tag, samples, heard.sampling_rate)
