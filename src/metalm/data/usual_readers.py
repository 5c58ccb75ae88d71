"""Who reads what of examples and chats, where nothing else is said: as in training."""

from __future__ import annotations

from metalm.config.model_schema import TEXT
from metalm.config.schema import RunConfig
from metalm.modalities import MEDIA


def usual_readers(config: RunConfig) -> dict[str, str]:
    """The encoder of each modality, by name; what none reads is the decoder's.

    Images and clips go to the encoder that the run's first source of examples names for them, else another
    source, else to the first that fits. Text goes where the first source of examples sends it, be it the
    decoder. In a run without one, whose random spans and prefixes of captions are what encoders read of text,
    it goes to an encoder of text alone that a source names, else to any that one names, else to the first of
    text alone.
    """
    encoders, examples = config.model.encoders, config.data.example_source
    sources = [*([] if examples is None else [examples]), *config.data.sources.values()]
    readers = {}
    for modality in MEDIA:
        fitting = [name for name, encoder in encoders.items() if encoder.section(modality) is not None]
        named = [source.readers.get(modality) for source in sources]
        if found := [name for name in (*named, *fitting) if name in fitting]:
            readers[modality] = found[0]
    if examples is not None:
        of_text = [examples.readers.get(TEXT)]
    else:
        alone = [name for name, encoder in encoders.items() if encoder.media is None]
        named = [source.readers.get(TEXT) for source in sources]
        of_text = [*(name for name in named if name in alone), *named, *alone]
    if found := [name for name in of_text if name in encoders and encoders[name].max_text_positions]:
        readers[TEXT] = found[0]
    return readers
