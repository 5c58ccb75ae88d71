"""MetaLM: semi-causal language models as general-purpose interfaces, pretrained at scale."""
