"""Pretrained encoders of transformers through interval attention, against their eager attention."""

import pytest
import torch
from transformers import AttentionInterface, RobertaConfig, RobertaModel, ViTConfig, ViTModel
from transformers.masking_utils import AttentionMaskInterface

from metalm.kernels import IntervalMask, backend_counts, reset_backend_counts
from metalm.kernels.adapters import TRANSFORMERS_NAME, transformers_attention, transformers_mask

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


@pytest.fixture(autouse=True)
def registered() -> None:
    AttentionInterface.register(TRANSFORMERS_NAME, transformers_attention)
    AttentionMaskInterface.register(TRANSFORMERS_NAME, transformers_mask)
    reset_backend_counts()


def roberta(implementation: str) -> RobertaModel:
    torch.manual_seed(0)
    config = RobertaConfig(vocab_size=50, max_position_embeddings=40, **SIZES)
    return RobertaModel._from_config(config, attn_implementation=implementation).eval()


@pytest.mark.parametrize("padding", [slice(9, None), slice(None, 8)], ids=["right", "left"])
def test_roberta_with_padding(padding: slice) -> None:
    tokens = torch.randint(3, 50, (3, 17))
    mask = torch.ones(3, 17, dtype=torch.long)
    mask[2, padding] = 0
    expected = roberta("eager")(tokens, attention_mask=mask).last_hidden_state
    ours = roberta(TRANSFORMERS_NAME)(tokens, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert backend_counts() == {"tiled": SIZES["num_hidden_layers"]}


def test_roberta_gradients() -> None:
    tokens = torch.randint(3, 50, (2, 17))
    grads = []
    for implementation in ("sdpa", TRANSFORMERS_NAME):
        model = roberta(implementation)
        model(tokens).last_hidden_state.square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    for expected, ours in zip(*grads, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)


def test_roberta_over_packed_spans() -> None:
    tokens = torch.randint(3, 50, (1, 12))
    positions = torch.tensor([[2, 3, 4, 5, 6, 2, 3, 4, 5, 6, 7, 8]])
    start = torch.tensor([[0] * 5 + [5] * 7])
    end = torch.tensor([[5] * 5 + [12] * 7])
    model = roberta(TRANSFORMERS_NAME)
    packed = model(
        tokens, position_ids=positions, interval_mask=IntervalMask.packed_spans(start, end)
    ).last_hidden_state
    for span in (slice(0, 5), slice(5, 12)):
        alone = roberta("eager")(tokens[:, span], position_ids=positions[:, span]).last_hidden_state
        torch.testing.assert_close(packed[:, span], alone, rtol=1e-4, atol=1e-5)


def test_vit() -> None:
    pixels = torch.randn(2, 3, 32, 32)
    outputs = []
    for implementation in ("eager", TRANSFORMERS_NAME):
        torch.manual_seed(0)
        config = ViTConfig(image_size=32, patch_size=8, **SIZES)
        model = ViTModel._from_config(config, attn_implementation=implementation).eval()
        outputs.append(model(pixels).last_hidden_state)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
    assert backend_counts() == {"tiled": SIZES["num_hidden_layers"]}


def test_dense_masks_are_refused() -> None:
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(ValueError, match="attention mask is a Tensor, expected an IntervalMask"):
        transformers_attention(torch.nn.Module(), q, q, q, torch.ones(1, 1, 4, 4))


def test_causal_layers_are_refused() -> None:
    module, q = torch.nn.Module(), torch.randn(1, 2, 4, 8)
    module.is_causal = True
    with pytest.raises(ValueError, match="Module is causal"):
        transformers_attention(module, q, q, q, None)
