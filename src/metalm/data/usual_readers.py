"""Who reads what of examples, where nothing else is said: as in training."""

from __future__ import annotations

from metalm.config.model_schema import TEXT
from metalm.config.schema import RunConfig
from metalm.modalities import MEDIA


def usual_readers(config: RunConfig) -> dict[str, str]:
    """The encoder of each modality, by name; what none reads is the decoder's.

    The encoder that the run's sources name for it, else the first that fits; of those that read text, one of
    text alone comes first. After training on examples whose texts the decoder read, it reads them.
    """
    encoders, sources = config.model.encoders, config.data.sources.values()
    fitting = {
        modality: [name for name, encoder in encoders.items() if encoder.section(modality) is not None]
        for modality in MEDIA
    }
    examples = config.data.example_source
    if examples is None or TEXT in examples.readers:
        reads_text = [name for name, encoder in encoders.items() if encoder.max_text_positions]
        fitting[TEXT] = sorted(reads_text, key=lambda name: encoders[name].media is not None)
    readers = {}
    for modality, names in fitting.items():
        named = [source.readers.get(modality) for source in sources]
        if found := [name for name in (*named, *names) if name in names]:
            readers[modality] = found[0]
    return readers
