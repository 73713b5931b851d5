"""`RolloutConfig` under its names of version 0.1."""

import importlib

import pytest

from qarvd_diffusers.rollout.config import RolloutConfig


@pytest.mark.parametrize("module", ["rollout.config", "models", "models.causal_fields"])
def test_causal_fields_is_an_old_name_of_rollout_config(module):
    with pytest.warns(DeprecationWarning, match="use RolloutConfig"):
        assert importlib.import_module(f"qarvd_diffusers.{module}").CausalFields is RolloutConfig


def test_the_old_property_gives_the_rollout_config(tiny_pipeline):
    with pytest.warns(DeprecationWarning, match="use rollout_config"):
        assert tiny_pipeline.causal_fields == tiny_pipeline.rollout_config


@pytest.mark.parametrize("name", RolloutConfig.names())
@pytest.mark.parametrize("value", [{"a": 1}, [None], [[1]], [True], float("nan"), 10**400], ids=range(6))
def test_values_of_another_type_are_named_before_they_are_compared(name, value):
    with pytest.raises(ValueError, match=name):
        RolloutConfig.from_config({name: value, "height": None})
