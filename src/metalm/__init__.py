"""MetaLM: semi-causal language models as general-purpose interfaces, pretrained at scale."""

__version__ = "0.1.0"
