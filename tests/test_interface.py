"""What Python shows of the public names: `dir`, `help` and `print` read well."""

from __future__ import annotations

import dataclasses
import inspect
import pydoc

import pytest

import moba_flex
from moba_flex import AutoModelForCausalLM, MobaConfig

SETTINGS = {field.name for field in dataclasses.fields(MobaConfig)}


def helped(thing: object) -> str:
    return pydoc.plain(pydoc.render_doc(thing))


def test_dir_shows_the_public_names_and_no_other():
    assert dir(moba_flex) == sorted(moba_flex.__all__)
    assert all(hasattr(moba_flex, name) for name in dir(moba_flex))


@pytest.mark.parametrize("thing", [moba_flex.patch, MobaConfig], ids=["patch", "MobaConfig"])
def test_help_spells_settings_out_and_says_each_in_a_line(thing):
    assert set(inspect.signature(thing).parameters) >= SETTINGS
    lines = [line.lstrip(" |") for line in helped(thing).splitlines()]
    for name in SETTINGS:
        (place,) = [i for i, line in enumerate(lines) if line.startswith(f"{name}: ")]
        assert lines[place].endswith("."), f"{name} takes more than one line"


@pytest.mark.parametrize("function", [AutoModelForCausalLM.from_pretrained, AutoModelForCausalLM.from_config, moba_flex.trace])
def test_other_functions_take_the_same_settings(function):
    assert set(inspect.signature(function).parameters) >= SETTINGS


def test_a_configuration_shows_its_blocks_and_what_differs_from_the_defaults():
    assert str(MobaConfig()) == "MobaConfig(block_size=4096, top_k=12)"
    config = MobaConfig(block_size=64, top_k=24, sink_blocks=1, full_attention_layers=[-1], decode="sparse")
    assert str(config) == "MobaConfig(block_size=64, top_k=24, sink_blocks=1, full_attention_layers=(-1,), decode='sparse')"
    assert eval(repr(config)) == config
