"""The tests that transformers has for its own models and processors, run on an exported folder by pytest.

TRANSFORMERS_SOURCE is transformers' source of the installed version, EXPORTED the folder. A source
distribution has the tests of models and processors only; where more is there, it runs too.
"""

from __future__ import annotations

import os
import sys
import types
import unittest
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoProcessor, AutoTokenizer
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto import modeling_auto

from metalm.conversion.shipped.processing_metalm import MetaLMProcessor

SOURCE, FOLDER = Path(os.environ["TRANSFORMERS_SOURCE"]), Path(os.environ["EXPORTED"])


def import_from_source() -> None:
    """Make `tests` the folder of the source, with empty mix-ins in place of files that it has not."""
    sys.path.insert(0, str(SOURCE))
    for name, path, content in (
        ("tests.exporters.test_export", "tests/exporters/test_export.py", "ExportTesterMixin"),
        ("tests.generation.test_utils", "tests/generation/test_utils.py", "GenerationTesterMixin"),
    ):
        if not (SOURCE / path).is_file():
            sys.modules.setdefault(name.rpartition(".")[0], types.ModuleType("absent"))
            sys.modules[name] = types.ModuleType(name)
            setattr(sys.modules[name], content, type(content, (), {}))
    if not (SOURCE / "utils" / "fetch_hub_objects_for_ci.py").is_file():
        fetch = sys.modules["fetch_hub_objects_for_ci"] = types.ModuleType("fetch_hub_objects_for_ci")
        fetch.url_to_local_path = lambda url: url


import_from_source()
from tests.generation.test_utils import GenerationTesterMixin  # noqa: E402
from tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor  # noqa: E402
from tests.test_processing_common import ProcessorTesterMixin  # noqa: E402

Model: Any = get_class_from_dynamic_module("modeling_metalm.MetaLMModel", FOLDER)
Generator: Any = get_class_from_dynamic_module("modeling_metalm.MetaLMForConditionalGeneration", FOLDER)
# As a model inside transformers has them: what a class is tested for depends on it.
modeling_auto.MODEL_MAPPING_NAMES["metalm"] = Model.__name__
modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["metalm"] = Generator.__name__


class Inputs:
    """Sizes and inputs in the form that the mix-ins ask for: a row is an image, two texts that encoders
    read, and some text."""

    batch_size = 3
    seq_length = 13
    num_hidden_layers = 2
    is_training = True

    def __init__(self) -> None:
        config = self.get_config()
        self.hidden_size, self.num_attention_heads = config.hidden_size, config.num_attention_heads

    def get_config(self) -> Any:
        return AutoConfig.from_pretrained(
            FOLDER, trust_remote_code=True, num_hidden_layers=self.num_hidden_layers
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        config = self.get_config()
        side = config.encoders[config.image_encoder]["image_size"]
        special = max(config.image_token_id, config.pad_token_id, config.eos_token_id)
        read = ids_tensor([self.batch_size, self.seq_length], config.vocab_size - special - 1) + special + 1
        read[:, : config.num_patches] = config.image_token_id
        numbers, encoders = torch.zeros_like(read), torch.zeros_like(read)
        after = config.num_patches
        for columns, number, name in (
            (slice(0, after), 1, config.image_encoder),
            (slice(after, after + 2), 2, config.image_encoder),
            (slice(after + 2, after + 5), 3, "text"),
        ):
            numbers[:, columns] = number
            encoders[:, columns] = list(config.encoders).index(name) + 1
        numbers[1, after : after + 2] = 1  # image and text together
        return config, {
            "input_ids": read.masked_fill(numbers > 0, config.image_token_id),
            "attention_mask": torch.ones_like(read),
            "pixel_values": floats_tensor([self.batch_size, 3, side, side]),
            "span_input_ids": read,
            "span_encoders": encoders,
            "span_numbers": numbers,
        }


def left_out(reason: str) -> Any:
    """A test that asks for what this model or processor does not do, on purpose."""
    return unittest.skip(reason)(lambda self: None)


class ModelTest(ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (Model, Generator)
    all_generative_model_classes = (Generator,)

    test_model_rope_scaling_from_config_0_linear = left_out("no checkpoint has it, so it is refused")
    test_model_rope_scaling_from_config_1_dynamic = left_out("no checkpoint has it, so it is refused")
    test_model_rope_scaling_from_config_2_yarn = left_out("no checkpoint has it, so it is refused")

    test_bc_cache_name_forward = left_out("either name of the cache is taken, without a warning")
    test_get_image_features_hidden_states = left_out("they are what the decoder sees, without layers")
    test_get_image_features_attentions = left_out("they are what the decoder sees, without layers")

    def setUp(self) -> None:
        self.model_tester = Inputs()

    def _prepare_for_class(self, inputs: Any, model_class: Any, return_labels: bool = False) -> Any:
        prepared = super()._prepare_for_class(inputs, model_class, return_labels=return_labels)
        if return_labels and model_class is Generator:
            prepared["labels"] = prepared["input_ids"].clone()
        return prepared


class ProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    # As a part of transformers: a class from a folder would write where it came from into what it saves.
    processor_class = MetaLMProcessor

    test_call_arguments_default_none = left_out("a call's options are named in its signature")
    test_call_arguments_not_in_processor_kwargs = left_out("a call's options are named in its signature")
    test_model_input_names = left_out("options of videos are refused")
    test_processor_text_has_no_visual = left_out("options of videos are refused")
    test_flat_kwarg_applied_when_modality_dict_lacks_it = left_out("options of videos are refused")
    test_apply_chat_template_assistant_mask = left_out("encoded turns have no offsets in the text")

    @classmethod
    def _setup_tokenizer(cls) -> Any:
        return AutoTokenizer.from_pretrained(FOLDER)

    @staticmethod
    def prepare_processor_dict() -> dict[str, Any]:
        processor = AutoProcessor.from_pretrained(FOLDER, trust_remote_code=True)
        names = ("chat_template", "encoders", "image_encoder", "text_encoder", "image_size", "readers")
        return {name: getattr(processor, name) for name in names}
