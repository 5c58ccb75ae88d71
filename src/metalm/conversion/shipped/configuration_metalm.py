"""Configuration of an exported MetaLM: a causal decoder and the encoders that dock onto it."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

ENCODER_DEFAULTS: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "num_key_value_heads": None,
    "activation": "gelu",
    "normalization": "deepnorm",
    "norm": "layer_norm",
    "norm_eps": 1e-5,
    "biases": True,
    "positions": "learned",
    "rope_base": 10_000.0,
    "max_text_positions": 64,
    "relative_bias": None,
    "joint_layers": None,
    "connector": "linear",
    "image_size": None,
    "patch_size": None,
    "audio": None,
    "pretrained": None,
    "image_mean": None,
    "image_std": None,
    "first_position": 0,
}


class MetaLMConfig(PreTrainedConfig):
    """Sizes of the decoder at the top level, those of the encoders by name in `encoders`.

    Args:
        num_key_value_heads: fewer than `num_attention_heads` in grouped-query attention.
        head_dim: width of a head; None: `hidden_size` divided by `num_attention_heads`.
        activation: "gelu", "gelu_tanh", "swiglu" or "geglu_tanh" (the last two with a gate).
        normalization: "deepnorm" (post-LN, residual weighted by (2 * layers) ** 0.25) or "pre_ln".
        parallel_residual: attention and feed-forward of a layer read the same input; with "pre_ln".
        norm: "layer_norm" or "rms_norm", with `norm_eps`.
        biases: of all linear layers; `qkv_biases` of queries, keys and values where the others have none.
        positions: "sinusoidal", "learned" (a table of `max_position_embeddings`) or "rope".
        max_position_embeddings: row length in training; only learned positions end there.
        rope_parameters: as in transformers; "rope_type" is "default" or "llama3".
        scale_embedding: multiply token embeddings by the square root of the hidden size; with "rounded", by
            that number as the model's dtype has it.
        scale_docked_vectors: multiply what encoders give so, too.
        spans: "causal", or "bidirectional": the decoder attends among all vectors of a span.
        encoders: by name, the keys of ENCODER_DEFAULTS; kept in alphabetical order. `image_size` and
            `patch_size` (pixels per side) are None for an encoder of text; `connector` is "linear" or
            "feed_forward"; `relative_bias` None or T5's `num_buckets` and `max_distance`; `positions` of
            text are "learned" or "rope"; `num_key_value_heads` None: as many as heads; `joint_layers`
            None, or the number of last layers with a joint feed-forward beside those of the modalities.
            `audio` is None, or what an encoder of clips reads, as in processor_config.json.
            `pretrained` is None, or the config of the model of transformers that the encoder is: `image_mean`
            and `image_std` are then of its pixels in 0..1, `first_position` of its text.
        image_encoder: the encoder of images that come without span tensors.
        image_token_id: stands in `input_ids` wherever an encoder's vector is docked.
        encoder_vocab_size: tokens that the encoders know; None: `vocab_size`.
        own_token_offset: added to the tokens of encoders that have a tokenizer of their own, and as large as
            `vocab_size` (None) until tokens are added to that.
        proved_on_transformers: the version that the folder was proved on; None if it was not.
    """

    model_type = "metalm"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012 - Trainer adds to such a list

    def __init__(
        self,
        vocab_size: int = 512,
        hidden_size: int = 32,
        num_hidden_layers: int = 2,
        num_attention_heads: int = 2,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        intermediate_size: int = 128,
        activation: str = "gelu",
        normalization: str = "deepnorm",
        parallel_residual: bool = False,
        norm: str = "layer_norm",
        norm_eps: float = 1e-5,
        biases: bool = True,
        qkv_biases: bool = False,
        positions: str = "sinusoidal",
        max_position_embeddings: int = 2048,
        rope_parameters: dict[str, Any] | None = None,
        scale_embedding: bool | str = True,
        scale_docked_vectors: bool = False,
        spans: str = "causal",
        encoders: dict[str, dict[str, Any]] | None = None,
        image_encoder: str | None = None,
        image_token_id: int | None = None,
        encoder_vocab_size: int | None = None,
        own_token_offset: int | None = None,
        proved_on_transformers: str | None = None,
        bos_token_id: int | None = 0,
        eos_token_id: int | None = 2,
        pad_token_id: int | None = 4,
        use_cache: bool = True,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.intermediate_size = intermediate_size
        self.activation = activation
        self.normalization = normalization
        self.parallel_residual = parallel_residual
        self.norm = norm
        self.norm_eps = norm_eps
        self.biases = biases
        self.qkv_biases = qkv_biases
        self.positions = positions
        self.max_position_embeddings = max_position_embeddings
        self.rope_parameters = rope_parameters or {"rope_type": "default", "rope_theta": 10000.0}
        self.scale_embedding = scale_embedding
        self.scale_docked_vectors = scale_docked_vectors
        self.spans = spans
        # By name, because JSON files that transformers writes are sorted: the place must not depend on it.
        self.encoders = {name: ENCODER_DEFAULTS | sizes for name, sizes in sorted((encoders or {}).items())}
        self.image_encoder = image_encoder
        self.image_token_id = image_token_id
        self.encoder_vocab_size = encoder_vocab_size or vocab_size
        self.own_token_offset = vocab_size if own_token_offset is None else own_token_offset
        self.proved_on_transformers = proved_on_transformers
        self.use_cache = use_cache
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.pad_token_id = pad_token_id
        self.tie_word_embeddings = tie_word_embeddings
        super().__init__(**kwargs)

    @property
    def num_patches(self) -> int:
        """Decoder positions that one image takes."""
        if self.image_encoder is None:
            return 0
        sizes = self.encoders[self.image_encoder]
        return (sizes["image_size"] // sizes["patch_size"]) ** 2
