"""The tests by which transformers judges its own model integrations, run on ours.

Every test of `ModelTesterMixin` runs for `AttnResModel` and `AttnResForCausalLM` over three backbones. Where it does
not pass, it runs for the backbone alone, and must fail or be skipped there too.
"""

from __future__ import annotations

import importlib.util
import sys
import types
import unittest
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from fetch_transformers_tests import DIRECTORY
from tiny import tiny_config
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from attnres import AttnResConfig, AttnResForCausalLM, AttnResModel

if not DIRECTORY.is_dir():
    pytest.skip(f"{DIRECTORY} is missing: run `python tests/fetch_transformers_tests.py`", allow_module_level=True)

FAMILIES = ("qwen3", "gemma2", "qwen3_moe")

# Not run, and why. The table in tests/README.md says the same.
NOT_RUN = {
    "test_moe_models_record_router_logits": "reads the model's source for experts, which are the backbone's",
    "test_generation_tester_mixin_inheritance": "GenerationTesterMixin is not in the source distribution",
}
NOT_RUN_WITHOUT_EXPERTS = "test_eager_matches_batched_and_grouped_inference"


def load_common_tests() -> types.ModuleType:
    """Imports `test_modeling_common`; two mixins it inherits from are not in the source distribution."""
    for name, mixin in (
        ("exporters.test_export", "ExportTesterMixin"),
        ("generation.test_utils", "GenerationTesterMixin"),
    ):
        package = name.split(".")[0]
        sys.modules[f"transformers_tests.{package}"] = types.ModuleType(f"transformers_tests.{package}")
        module = types.ModuleType(f"transformers_tests.{name}")
        setattr(module, mixin, type(mixin, (), {}))
        sys.modules[f"transformers_tests.{name}"] = module
    root = types.ModuleType("transformers_tests")
    root.__path__ = [str(DIRECTORY)]
    sys.modules["transformers_tests"] = root
    return importlib.import_module("transformers_tests.test_modeling_common")


common = load_common_tests()


class ModelTester:
    """What the mixin wants to know of a model: how to configure it, what to feed it, and its sizes."""

    batch_size = 3
    seq_length = 7
    is_training = True
    num_hidden_layers = 2
    hidden_size = 32
    num_attention_heads = 4

    def __init__(self, parent: unittest.TestCase, family: str, is_attnres: bool):
        self.family = family
        self.is_attnres = is_attnres

    def get_config(self) -> PreTrainedConfig:
        config = tiny_config(self.family, num_hidden_layers=self.num_hidden_layers, initializer_range=0.02)
        return AttnResConfig(backbone_config=config, block_size=3) if self.is_attnres else config

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, Any]]:
        config = self.get_config()
        input_ids = common.ids_tensor([self.batch_size, self.seq_length], config.vocab_size)
        attention_mask = torch.tril(torch.ones_like(input_ids))
        return config, {"input_ids": input_ids, "attention_mask": attention_mask}

    def prepare_config_and_inputs_for_model_class(self, model_class: type) -> tuple[PreTrainedConfig, dict[str, Any]]:
        return self.prepare_config_and_inputs_for_common()


def suite(family: str, is_attnres: bool) -> type[unittest.TestCase]:
    config = tiny_config(family)
    if is_attnres:
        attnres_config = AttnResConfig(backbone_config=config)
        classes = tuple(kind.of_backbone(attnres_config) for kind in (AttnResModel, AttnResForCausalLM))
    else:
        classes = (AutoModel._model_mapping[type(config)], AutoModelForCausalLM._model_mapping[type(config)])

    def set_up(self: Any) -> None:
        self.model_tester = ModelTester(self, family, is_attnres)

    name = f"{'AttnRes' if is_attnres else 'Backbone'}_{family}"
    attributes = {"setUp": set_up, "all_model_classes": classes, "pipeline_model_mapping": {}, "__module__": __name__}
    return type(name, (common.ModelTesterMixin, unittest.TestCase), attributes)


SUITES = {(family, is_attnres): suite(family, is_attnres) for family in FAMILIES for is_attnres in (True, False)}
TEST_NAMES = unittest.TestLoader().getTestCaseNames(SUITES[FAMILIES[0], True])


def run(family: str, is_attnres: bool, test_name: str) -> tuple[str, str]:
    """Runs one test of one suite; returns its outcome and why."""
    result = unittest.TestResult()
    SUITES[family, is_attnres](test_name).run(result)
    if problems := result.failures + result.errors:
        return "failed", problems[0][1]
    if result.skipped:
        return "skipped", result.skipped[0][1]
    return "passed", ""


@pytest.fixture(autouse=True, scope="module")
def known_to_the_mixin() -> Iterator[None]:
    """The mixin prepares labels by looking class names up in these tables."""
    with patch.dict(MODEL_MAPPING_NAMES, {"attnres": "AttnResModel"}):
        yield


@pytest.mark.parametrize("test_name", TEST_NAMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_as_good_as_the_backbone(family: str, test_name: str) -> None:
    if test_name in NOT_RUN:
        pytest.skip(NOT_RUN[test_name])
    if test_name.startswith(NOT_RUN_WITHOUT_EXPERTS) and "moe" not in family:
        pytest.skip("the backbone has no experts")
    outcome, why = run(family, True, test_name)
    if outcome == "passed":
        return
    backbone_outcome, backbone_why = run(family, False, test_name)
    if backbone_outcome == "passed":
        pytest.fail(f"{outcome} for AttnRes, passes for the backbone alone:\n{why}")
    if outcome == "failed" and backbone_outcome == "skipped":
        pytest.fail(f"failed for AttnRes, skipped for the backbone alone ({backbone_why}):\n{why}")
    pytest.skip(f"{outcome}; the backbone alone: {backbone_outcome} ({(backbone_why.splitlines() or [''])[-1]})")
