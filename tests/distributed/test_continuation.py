"""What engines say of rows that they hold the beginnings of is what the plain model says of whole rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from distributed.continuations import (
    BEAMS,
    ENDINGS,
    NEW_TOKENS,
    SpecialTokens,
    by_beams,
    documents,
    greedily,
    how_likely,
    prompts,
)
from distributed.ranks import run_ranks
from distributed.test_options import start_weights
from distributed.tiny import LENGTH, OPTIONS, tiny_config
from metalm.evaluation.beam_search import beam_search
from metalm.model.decoder import Decoder
from metalm.model.encoder import EncoderBank
from metalm.parallel.topology import Topology
from reference.model import document_logits
from reference.rows import DOCUMENT, Document

LAYOUTS = {
    2: {
        "tp2, positions split": {"zero": "2,3", "tensor": 2, "sequence_parallel": True, "options": "llama"},
        "cp2": {"zero": "1,1", "context": 2},
        "dp2": {"zero": "3,3", "options": "mixed"},
    },
    4: {
        "tp2 x cp2": {
            "zero": "2,3",
            "tensor": 2,
            "context": 2,
            "sequence_parallel": True,
            "options": "llama",
        },
    },
}


class Model:
    """Decoder and encoders on one rank, without engines."""

    def __init__(self, options: str, weights: dict[str, torch.Tensor], topology: Topology) -> None:
        model = tiny_config("unused", options=options).model
        self.decoder, self.encoders = Decoder(model, LENGTH, topology), EncoderBank(model)
        for part, module in self.by_component().items():
            for name, parameter in module.named_parameters():
                parameter.data.copy_(weights[f"{part}/{name}"])

    def by_component(self) -> dict[str, Any]:
        return {"decoder": self.decoder, "encoders": self.encoders}


class Plain:
    """What the plain model generates."""

    def __init__(self, options: str, weights: dict[str, torch.Tensor]) -> None:
        self._config, self._weights = tiny_config("unused", options=options).model, weights
        self._documents = documents()
        self._rooms = [min(NEW_TOKENS, LENGTH - len(one.tokens)) for one in self._documents]

    def greedily(self) -> list[list[int]]:
        found = []
        for document, room in zip(self._documents, self._rooms, strict=True):
            tokens: list[int] = []
            while len(tokens) < room:
                token = int(self._next(document, tokens).argmax())
                if token == DOCUMENT:
                    break
                tokens.append(token)
            found.append(tokens)
        return found

    def by_beams(self) -> list[list[int]]:
        beams = int(BEAMS["num_beams"])

        def next_logits(tokens: Sequence[Sequence[int]]) -> torch.Tensor:
            of = [self._documents[number // beams] for number in range(len(tokens))]
            return torch.stack([self._next(*one) for one in zip(of, tokens, strict=True)])

        return beam_search(
            next_logits,
            len(self._documents),
            num_beams=beams,
            length_penalty=BEAMS["length_penalty"],
            max_new_tokens=self._rooms,
            end=DOCUMENT,
        )

    def how_likely(self) -> list[list[float]]:
        """All that the model says of `ENDINGS`, and how many tokens count, end to end."""
        found = []
        for document, endings in zip(self._documents, ENDINGS, strict=True):
            said = []
            for ending in endings:
                each = [
                    self._next(document, ending.tokens[:n]).log_softmax(-1)[token].item()
                    for n, token in enumerate(ending.tokens)
                ]
                total = sum(weight * one for weight, one in zip(ending.weights, each, strict=True))
                said += [total, sum(weight > 0 for weight in ending.weights)]
            found.append(said)
        return found

    def _next(self, document: Document, tokens: Sequence[int]) -> torch.Tensor:
        whole = Document([*document.tokens, *tokens], document.spans)
        return document_logits(whole, self._weights, self._config)[-1]


@pytest.mark.parametrize("options", OPTIONS)
def test_one_rank_says_what_the_plain_model_does(options: str, topology: Topology) -> None:
    weights = start_weights(topology, options)
    config: Any = tiny_config("unused", options=options)
    plain = Plain(options, weights)
    asked = (Model(options, weights, topology), topology, config, SpecialTokens(), prompts())
    assert greedily(*asked) == plain.greedily()
    found = by_beams(*asked)
    assert found == plain.by_beams()
    assert [len(one) for one in found][4:] == [0, 4]
    for said, wanted in zip(how_likely(*asked), plain.how_likely(), strict=True):
        assert [value for one in said for value in one] == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("num_ranks", LAYOUTS)
def test_ranks_say_what_the_plain_model_does(num_ranks: int, topology: Topology) -> None:
    layouts = LAYOUTS[num_ranks]
    words = [json.dumps({"name": name, **layout}) for name, layout in layouts.items()]
    results = run_ranks("continue_prompts", num_ranks, *words)
    assert [result["name"] for result in results] == list(layouts)
    for result in results:
        options = str(layouts[result["name"]].get("options", "paper"))
        plain = Plain(options, start_weights(topology, options))
        assert result["greedy"] == plain.greedily(), result["name"]
        assert result["beams"] == plain.by_beams(), result["name"]
        for said, wanted in zip(result["likelihoods"], plain.how_likely(), strict=True):
            assert [value for one in said for value in one] == pytest.approx(wanted, abs=1e-4)
