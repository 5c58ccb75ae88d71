"""What one rank executes in a micro-batch: matrix products by shape, attention, bytes of elementwise work.

Counted as the kernels run, not as utilisation counts: attention's backward makes its scores again, the output
layer its logits where they are not kept, recomputed layers their forward pass. Elementwise work is counted in
bytes read and written, operation by operation as PyTorch runs them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from metalm.config import DecoderConfig, EncoderConfig, RunConfig
from metalm.loss_chunks import chunk_positions
from metalm.modalities import modality_of_encoder
from metalm.model.flops import EncoderWork, Work, trains_output
from metalm.model.graph_rules import why_no_encoder_graphs, why_not_graphs
from metalm.planning.memory import element_size, share_elements

SCORES_AGAIN = 3
"""Matrix products of attention's backward beyond the 4 that are counted: scores, twice, and their gradients
once more, in the kernels that have a pass for queries and one for keys."""
_LOSS_PASSES = 6
"""Times that a chunk of logits is read or written besides its products."""
_HOST_FORWARD_SHARE = 0.4
"""Of a layer's host time, forward and backward."""
DECODER_LAYER, ENCODER_LAYER = "host, decoder layer", "host, encoder layer"
GRAPH_LAYER = "host, layer from a graph"


class Attention(NamedTuple):
    """Of all layers of a part."""

    mask: str
    """As in `AttentionRate`."""
    head_size: int
    keys: float
    """That a query sees, on average."""
    is_dropped: bool
    """Whether weights are dropped."""
    operations: float
    """Of one layer's forward pass."""
    forwards: float
    """How often that runs."""
    backwards: float


@dataclass
class Executed:
    """What a part of a micro-batch is made of, on one rank."""

    products: dict[tuple[float, float, float], float] = field(default_factory=dict)
    """How often each shape [rows, inner] x [inner, columns] is multiplied."""
    attention: list[Attention] = field(default_factory=list)
    num_bytes: float = 0.0
    """Of elementwise work."""

    def multiply(self, rows: float, inner: float, columns: float, times: float = 1) -> None:
        """Add a product."""
        if times and rows:
            self.products[rows, inner, columns] = self.products.get((rows, inner, columns), 0.0) + times

    @property
    def flops(self) -> float:
        """Operations of all."""
        total = sum(2 * m * k * n * times for (m, k, n), times in self.products.items())
        for one in self.attention:
            total += one.operations * (one.forwards + one.backwards * (2 + SCORES_AGAIN / 2))
        return total


@dataclass(frozen=True)
class MicroBatch:
    """Of one rank."""

    decoder: Executed
    output: Executed
    encoders: dict[str, Executed]
    host_layers: dict[str, float]
    """Layers that the host goes through, a forward and backward each, by the figure of their time."""
    gathers: dict[str, float]
    """By engine: layers times passes, each gathered under ZeRO 3."""

    def parts(self) -> Iterator[tuple[str, Executed]]:
        """All of it by name."""
        yield "decoder", self.decoder
        yield "output layer", self.output
        yield from self.encoders.items()


def micro_batch_work(
    config: RunConfig, work: Work, rows: float, stages: Mapping[str, int], *, on_cpu: bool
) -> MicroBatch:
    """What one rank does.

    Args:
        config: of the run.
        work: the mean content of the rows.
        rows: of the micro-batch.
        stages: of ZeRO, by engine.
        on_cpu: decides how many logits are kept, and whether layers may run from CUDA graphs.
    """
    decoder = config.model.decoder
    encoders = {
        name: _encoder(config, name, work) for name in config.model.encoders if work.encoders[name].elements
    }
    device_type = "cpu" if on_cpu else "cuda"
    host_layers = dict.fromkeys((DECODER_LAYER, ENCODER_LAYER, GRAPH_LAYER), 0.0)
    gathered = 0.0
    for one in config.model.encoders.values():
        trained = one.num_layers - (0 if one.adapter is not None else one.num_frozen_layers)
        passes = 1 if one.recompute and trained else 0
        layers = one.num_layers * _HOST_FORWARD_SHARE
        layers += trained * (1 - _HOST_FORWARD_SHARE + passes * _HOST_FORWARD_SHARE)
        is_launched = why_no_encoder_graphs(config, one, device_type, stages["encoders"])
        host_layers[ENCODER_LAYER if is_launched else GRAPH_LAYER] += layers
        gathered += one.num_layers + trained
    again = _HOST_FORWARD_SHARE if decoder.recompute is True else 0.0
    is_launched = why_not_graphs(config, device_type, stages["decoder"])
    host_layers[DECODER_LAYER if is_launched else GRAPH_LAYER] += decoder.num_layers * (1 + again)
    return MicroBatch(
        decoder=_decoder(config, work, rows, on_cpu=on_cpu),
        output=_output(config, rows, on_cpu=on_cpu),
        encoders=encoders,
        host_layers=host_layers,
        gathers={"decoder": 2.0 * decoder.num_layers, "encoders": gathered},
    )


def _decoder(config: RunConfig, work: Work, rows: float, *, on_cpu: bool) -> Executed:
    decoder, tensor, size = config.model.decoder, config.parallel.tensor, element_size(config)
    hidden, inner = decoder.hidden_size, decoder.feed_forward_size / tensor
    gates, width = 2 if decoder.is_gated else 1, decoder.attention_size / tensor
    key_values = 2 * decoder.key_value_heads * decoder.head_size / tensor
    positions = rows * config.data.sequence_length / config.parallel.context
    shapes = [
        (hidden, width + key_values),
        (width, hidden),
        (hidden, gates * inner),
        (inner, hidden),
    ]
    frozen = 0 if decoder.adapter is not None else decoder.num_frozen_layers
    weightless = decoder.num_layers if decoder.adapter is not None else frozen
    below = decoder.adapter is not None or any(one.is_trained for one in config.model.encoders.values())
    backward = decoder.num_layers if below else decoder.num_layers - frozen
    forward = decoder.num_layers + (backward if decoder.recompute is True else 0)
    found = Executed()
    for inner_size, outer_size in shapes:
        found.multiply(positions, inner_size, outer_size, forward)
        found.multiply(positions, outer_size, inner_size, backward)
        found.multiply(inner_size, positions, outer_size, decoder.num_layers - weightless)
    is_long = work.pairs > work.positions * config.data.sequence_length / 4
    # On GPUs rows with spans are for other kernels than those of causal documents alone.
    mask = "causal" if is_long and (on_cpu or not config.model.encoders) else "packed"
    keys, is_dropped = work.pairs / work.positions, decoder.dropout > 0
    operations = 4 * width / config.parallel.context * work.pairs
    found.attention.append(
        Attention(mask, decoder.head_size, keys, is_dropped, operations, forward, backward)
    )
    split = tensor if config.parallel.sequence_parallel else 1
    ahead, back, cheap = _elementwise(
        decoder, hidden / split, width, key_values, inner, decoder.positions == "rope"
    )
    again = cheap * backward if decoder.recompute == "selective" else 0.0
    per_position = ahead * forward + back * backward + again + 12 * hidden  # and the ends
    found.num_bytes = size * positions * per_position
    return found


def _output(config: RunConfig, rows: float, *, on_cpu: bool) -> Executed:
    decoder, size = config.model.decoder, element_size(config)
    vocabulary = config.model.padded_vocab_size / config.parallel.tensor
    positions = rows * config.data.sequence_length / config.parallel.context
    found = Executed()
    if not decoder.is_trained and not any(one.is_trained for one in config.model.encoders.values()):
        return found
    kept = positions <= chunk_positions(int(vocabulary), size, on_cpu=on_cpu)
    found.multiply(positions, decoder.hidden_size, vocabulary, 1 if kept else 2)
    found.multiply(positions, vocabulary, decoder.hidden_size)
    if trains_output(decoder):
        found.multiply(vocabulary, positions, decoder.hidden_size)
    found.num_bytes = size * _LOSS_PASSES * positions * vocabulary
    return found


def _encoder(config: RunConfig, name: str, work: Work) -> Executed:
    encoder, sharing = config.model.encoders[name], config.parallel.rows_size
    part = work.encoders[name]
    elements = float(share_elements(work, name, sharing))
    share = EncoderWork(elements, part.pairs / sharing, part.patches / sharing)
    hidden, inner = encoder.hidden_size, encoder.feed_forward_size
    gates = 2 if encoder.is_gated else 1
    key_values = 2 * encoder.key_value_heads * encoder.head_size
    trained = encoder.num_layers - (0 if encoder.adapter is not None else encoder.num_frozen_layers)
    forward = encoder.num_layers + (trained if encoder.recompute else 0)
    weights = 0 if encoder.adapter is not None else trained
    found = Executed()
    for inner_size, outer_size in [
        (hidden, hidden + key_values),
        (hidden, hidden),
        (hidden, gates * inner),
        (inner, hidden),
    ]:
        found.multiply(elements, inner_size, outer_size, forward)
        found.multiply(elements, outer_size, inner_size, trained)
        found.multiply(inner_size, elements, outer_size, weights)
    keys, is_dropped = share.pairs / share.elements, encoder.dropout > 0
    operations = 4 * hidden * share.pairs
    found.attention.append(
        Attention("encoder", encoder.head_size, keys, is_dropped, operations, forward, trained)
    )
    ahead, back, _ = _elementwise(encoder, hidden, hidden, key_values, inner, encoder.positions == "rope")
    found.num_bytes = element_size(config) * elements * (ahead * forward + back * trained)
    if share.patches:
        width = modality_of_encoder(encoder).weights_per_vector(encoder) / hidden
        found.multiply(share.patches, width, hidden, 2 if trained == encoder.num_layers else 1)
    outer = config.model.decoder.hidden_size
    if encoder.connector != "detection":
        passes = 3 if encoder.trained_connector else 2 if encoder.is_trained else 1
        found.multiply(elements, hidden, outer, passes)
        if encoder.connector == "feed_forward":
            found.multiply(elements, outer, outer, 2 * passes)
    return found


def _elementwise(
    layer: DecoderConfig | EncoderConfig,
    stream: float,
    width: float,
    key_values: float,
    inner: float,
    rotary: bool,
) -> tuple[float, float, float]:
    """Elements read and written per position and layer: forward, backward, and what is cheap to make again.

    Args:
        layer: what it consists of.
        stream: width of the residual stream on this rank.
        width: of the queries of this rank.
        key_values: of keys and values together.
        inner: of the feed-forward on this rank.
        rotary: whether queries and keys are turned.
    """
    norms, residuals = 2 * 2 * stream, 2 * 3 * stream
    activation = (5 if layer.is_gated else 2) * inner
    layout = 2 * (2 * width + key_values)
    turned = 8 * (width + key_values / 2) if rotary else 0.0
    gates = 2 if layer.is_gated else 1
    biases = 2 * (width + key_values + 2 * stream + gates * inner) if layer.biases else 0.0
    dropped = 12 * 2 * stream if layer.dropout else 0.0
    forward = norms + residuals + activation + layout + turned + biases + dropped
    backward = (
        2.0 * norms
        + residuals
        + (10 if layer.is_gated else 3) * inner
        + 2 * layout
        + turned
        + biases / 2
        + dropped
    )
    return forward, backward, norms + activation
