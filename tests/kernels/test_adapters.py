"""Models of transformers through interval attention, against their eager attention."""

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralModel,
    RobertaConfig,
    RobertaModel,
    ViTConfig,
    ViTModel,
)

from metalm.kernels import IntervalMask, backend_counts, reset_backend_counts
from metalm.kernels.adapters import TRANSFORMERS_NAME, register_interval_attention, transformers_attention

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


@pytest.fixture(autouse=True)
def registered() -> None:
    assert register_interval_attention() == TRANSFORMERS_NAME
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


def test_a_causal_layer_without_a_mask_is_causal() -> None:
    module, q = torch.nn.Module(), torch.randn(1, 2, 4, 8)
    module.is_causal = True
    expected = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    ours, _ = transformers_attention(module, q, q, q, None)
    torch.testing.assert_close(ours.transpose(1, 2), expected)
    with pytest.raises(ValueError, match="no mask for 2 queries of 4 keys"):
        transformers_attention(module, q[:, :, :2], q, q, None)


def test_what_attention_is_asked_for_beyond_a_mask_is_refused() -> None:
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(ValueError, match="asks for softcap"):
        transformers_attention(torch.nn.Module(), q, q, q, None, softcap=30.0)


def test_padding_in_the_middle_is_refused() -> None:
    tokens = torch.randint(3, 50, (1, 5))
    with pytest.raises(ValueError, match="the padding mask is not one interval"):
        roberta(TRANSFORMERS_NAME)(tokens, attention_mask=torch.tensor([[1, 1, 0, 1, 1]]))


def llama(implementation: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=50, num_key_value_heads=2, **SIZES)
    return LlamaForCausalLM._from_config(config, attn_implementation=implementation).eval()


def test_a_decoder_with_grouped_heads_over_left_padding() -> None:
    tokens = torch.randint(3, 50, (3, 17))
    mask = torch.ones(3, 17, dtype=torch.long)
    mask[2, :8] = 0
    expected = llama("eager")(tokens, attention_mask=mask).logits
    ours = llama(TRANSFORMERS_NAME)(tokens, attention_mask=mask).logits
    torch.testing.assert_close(ours[mask > 0], expected[mask > 0], rtol=1e-4, atol=1e-5)
    assert backend_counts() == {"tiled": SIZES["num_hidden_layers"]}


@pytest.mark.parametrize("padding", [0, 4])
def test_a_decoder_generates_with_its_cache(padding: int) -> None:
    tokens = torch.randint(3, 50, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :padding] = 0
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = llama("eager").generate(tokens, attention_mask=mask, **options)
    assert torch.equal(llama(TRANSFORMERS_NAME).generate(tokens, attention_mask=mask, **options), expected)
    assert backend_counts() == {"tiled": 8 * SIZES["num_hidden_layers"]}


def test_a_sliding_window_and_packed_positions() -> None:
    tokens = torch.randint(3, 50, (1, 20))
    positions = torch.cat((torch.arange(12), torch.arange(8)))[None]
    outputs = []
    for implementation in ("eager", TRANSFORMERS_NAME):
        torch.manual_seed(0)
        config = MistralConfig(vocab_size=50, num_key_value_heads=2, sliding_window=5, **SIZES)
        model = MistralModel._from_config(config, attn_implementation=implementation).eval()
        outputs += [model(tokens).last_hidden_state, model(tokens, position_ids=positions).last_hidden_state]
    for expected, ours in zip(outputs[:2], outputs[2:], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
