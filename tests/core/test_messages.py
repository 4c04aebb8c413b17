"""Whatever is given in place of an argument: one short line that names the argument and says what it was."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig

from moba_flex import (
    AutoModelForCausalLM,
    MobaConfig,
    MobaSchedule,
    compat,
    moba_attention,
    moba_attention_varlen,
    patch,
    select_blocks,
    set_cuda_graphs,
    set_flex_backend,
    set_working_memory,
    unpatch,
    visualize,
)
from moba_flex.core.messages import shown

X, P = torch.zeros(1, 2, 8, 4), torch.zeros(8, 2, 4)
BOUNDS = torch.tensor([0, 3, 8], dtype=torch.int32)


class Unspeakable:
    """Its `repr` raises."""

    def __repr__(self) -> str:
        raise RuntimeError("no words")


class LongWinded:
    def __repr__(self) -> str:
        return "line\n" * 1000


ODD = {
    "None": None,
    "an int of many digits": 10**5000,
    "a negative one": -(10**5000),
    "a float": 2.5,
    "NaN": float("nan"),
    "a complex number": 1j,
    "a long text": "x" * 5000,
    "lines": "a\nb",
    "bytes": b"eager",
    "a list": [1, 2],
    "a long list": list(range(5000)),
    "a list of large ints": [10**5000],
    "a dict": {"a": 1},
    "a long dict": {i: i for i in range(5000)},
    "an array": np.zeros((3, 4)),
    "an array of texts": np.array(["eager", "naive"]),
    "an array without dimensions": np.array(7.5),
    "a tensor": torch.zeros(50, 50),
    "a tensor of flags": torch.tensor([True, False]),
    "a scalar tensor": torch.tensor(2.5),
    "a meta tensor": torch.zeros(3, device="meta"),
    "a nested tensor": torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
    "a function": len,
    "a class": int,
    "what cannot be shown": Unspeakable(),
    "what is long to show": LongWinded(),
}
BLOCKS = ("block_size", "top_k", "sink_blocks", "recent_blocks", "share_selection")
SCORES = ("scale", "softcap", "sinks", "return_lse", "implementation")
Q = {"q": P, "k": P, "v": P}
LENGTHS = {"moba_chunk_size": 4, "moba_topk": 2}
SCHEDULE = MobaSchedule()
SOUND = {
    moba_attention: {"query": X, "key": X, "value": X, "block_size": 4, "top_k": 2},
    moba_attention_varlen: {"query": P, "key": P, "value": P, "cu_seqlens": BOUNDS, "block_size": 4, "top_k": 2},
    select_blocks: {"query": X, "key": X, "block_size": 4, "top_k": 2},
    compat.moba_attn_varlen: {**Q, "cu_seqlens": BOUNDS, "max_seqlen": 5, **LENGTHS},
    compat.moba_attn_varlen_naive: {**Q, "cu_seqlens": BOUNDS, "max_seqlen": 5, **LENGTHS},
    compat.flash_moba_varlen_func: {**Q, "cu_seqlens_q": BOUNDS, "cu_seqlens_k": BOUNDS, "max_seqlen_q": 5, "max_seqlen_k": 5, **LENGTHS},
    set_working_memory: {"n_bytes": 1 << 30},
    set_cuda_graphs: {"enabled": True},
    set_flex_backend: {"name": "triton"},
    MobaConfig: {"block_size": 4, "top_k": 2},
    SCHEDULE.attention_at: {"step": 1, "n_steps": 10, "layers": [0, 1]},
    visualize: {"selection": select_blocks(X, X, block_size=4, top_k=2)},
    unpatch: {},
    AutoModelForCausalLM.from_config: {},
}
ARGUMENTS = {
    moba_attention: ("query", "key", "value", "padding_mask", "causal", *BLOCKS, *SCORES),
    moba_attention_varlen: ("query", "key", "value", "cu_seqlens", "cu_seqlens_k", "causal", *BLOCKS, *SCORES),
    select_blocks: ("query", "key", "padding_mask", "causal", *BLOCKS),
    compat.moba_attn_varlen: ("q", "k", "v", "cu_seqlens", "moba_chunk_size", "moba_topk"),
    compat.moba_attn_varlen_naive: ("q", "k", "v", "cu_seqlens", "moba_chunk_size", "moba_topk"),
    compat.flash_moba_varlen_func: ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "moba_chunk_size", "moba_topk", "causal"),
    set_working_memory: ("n_bytes",),
    set_cuda_graphs: ("enabled",),
    set_flex_backend: ("name",),
    MobaConfig: (*BLOCKS, "key_conv", "full_attention_layers", "decode", "implementation"),
    SCHEDULE.attention_at: ("step", "n_steps", "layers"),
    visualize: ("selection", "row", "heads", "title"),
    unpatch: ("model",),
    AutoModelForCausalLM.from_config: ("config",),
}
ALLOWED = {  # argument, value: what is no mistake
    *[(name, "None") for name in ("padding_mask", "cu_seqlens_k", "scale", "softcap", "sinks", "heads", "title")],
    *[(name, "a float") for name in ("scale", "softcap")],
    *[("title", text) for text in ("a long text", "lines")],
    *[("layers", listed) for listed in ("a list", "a long list", "a list of large ints")],
    ("full_attention_layers", "a list"),
    ("full_attention_layers", "a long list"),
    ("full_attention_layers", "a list of large ints"),  # which layers there are is the model's to say
}
OUR_NAMES = r"\b(query|key|value|block_size|top_k|implementation|padding_mask)\b"  # which functions of other implementations do not have


EACH = {f"{function.__name__}-{name}": (function, name) for function, names in ARGUMENTS.items() for name in names}


@pytest.mark.parametrize(("function", "name"), EACH.values(), ids=EACH)
def test_anything_odd_gets_one_short_line_that_names_the_argument(function, name: str):
    for what, odd in ODD.items():
        if (name, what) in ALLOWED:
            continue
        with pytest.raises((ValueError, TypeError)) as raised:
            function(**{**SOUND[function], name: odd})
        message = f"{what}: {raised.value}"
        assert raised.type in (ValueError, TypeError), message
        assert re.search(rf"\b{name}\b", message), message
        assert function.__module__ != compat.__name__ or not re.search(OUR_NAMES, message), message
        assert message.isprintable(), message
        assert len(message) < 260, message


WRONG_SHAPES = {
    "a width of 0": {"q": P[..., :0], "k": P[..., :0]},
    "fewer queries": {"q": P[:5], "cu_seqlens": torch.tensor([0, 5]), "cu_seqlens_q": torch.tensor([0, 3, 5]), "cu_seqlens_k": BOUNDS[:2]},
    "two dimensions": {"k": P[0]},
    "another width": {"k": P[..., :3]},
    "more values": {"v": torch.zeros(9, 2, 4)},
    "three heads for two": {"q": torch.zeros(8, 3, 4)},
    "another dtype": {"v": P.half()},
    "another device": {"k": P.to("meta")},
    "bounds on another device": {"cu_seqlens": BOUNDS.to("meta"), "cu_seqlens_k": BOUNDS.to("meta")},
    "bounds that end too late": {"cu_seqlens": torch.tensor([0, 9]), "cu_seqlens_k": torch.tensor([0, 3, 9])},
}


@pytest.mark.parametrize("wrong", WRONG_SHAPES.values(), ids=WRONG_SHAPES)
@pytest.mark.parametrize("function", [compat.moba_attn_varlen, compat.moba_attn_varlen_naive, compat.flash_moba_varlen_func])
def test_functions_of_other_implementations_name_the_arguments_that_they_have(function, wrong: dict):
    sound = SOUND[function]
    with pytest.raises((ValueError, TypeError)) as raised:
        function(**{**sound, **{name: x for name, x in wrong.items() if name in sound}})
    message = str(raised.value)
    assert re.search(r"\b(q|k|v|cu_seqlens(_q|_k)?)\b", message) and not re.search(OUR_NAMES, message), message
    assert set(re.findall(r"cu_seqlens\w*", message)) <= sound.keys(), message


@pytest.mark.parametrize("function", [compat.moba_attn_varlen, compat.flash_moba_varlen_func])
def test_functions_of_other_implementations_say_which_function_takes_transforms(function):
    call = {**SOUND[function]}
    with pytest.raises(NotImplementedError, match=r"need (moba_attn_varlen_naive|moba_flex\.moba_attention_varlen with implementation)"):
        torch.func.grad(lambda q: function(**{**call, "q": q}).sum())(P)


def test_an_unknown_setting_is_shown_short_with_those_that_there_are():
    with pytest.raises(ValueError, match=r"a str of 5000 characters .* is no setting of MoBA: there are block_size, top_k, ") as raised:
        MobaConfig.from_dict({"x" * 5000: 1})
    assert len(str(raised.value)) < 260


def test_no_larger_top_k_is_named_than_there_can_be():
    with pytest.raises(ValueError, match=r"has no room for the own block, .*: lower these$"):
        MobaConfig(top_k=2, sink_blocks=2**63 - 1, recent_blocks=2**63 - 1)


@pytest.mark.parametrize("endless", [itertools.count(), range(10**9)], ids=["an iterator", "a range"])
def test_an_endless_list_of_layers_is_refused(endless):
    with pytest.raises(ValueError, match="full_attention_layers must have at most 100000 entries, but is"):
        MobaConfig(full_attention_layers=endless)


def test_a_layer_of_many_digits_is_shown_short():
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2))
    with pytest.raises(ValueError, match="full_attention_layers has an int of 5001 digits, but LlamaForCausalLM has the layers 0, 1"):
        patch(model, full_attention_layers=[10**5000])


@pytest.mark.parametrize("name", [None, 7, 10**5000, b"x", ["x"] * 5000], ids=["None", "7", "digits", "bytes", "list"])
def test_what_is_no_name_of_a_model_is_refused_before_loading(name):
    with pytest.raises(TypeError, match=r"^name must be a name on the hub or a local folder, but is [^\n]{1,80}$"):
        AutoModelForCausalLM.from_pretrained(name)


def test_a_configuration_of_another_kind_of_model_is_named():
    with pytest.raises(ValueError, match="config must be of a causal language model, but is a ViTConfig"):
        AutoModelForCausalLM.from_config(ViTConfig())


@pytest.mark.parametrize("function", [moba_attention, select_blocks, moba_attention_varlen])
def test_select_blocks_alone_needs_values(function):
    tensors = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in SOUND[function].items()}
    if function is select_blocks:
        with pytest.raises(ValueError, match="query must have values, which select_blocks reads, but is on the meta device"):
            function(**tensors)
    else:
        assert function(**tensors).is_meta


SHOWN = [
    (7, "7"),
    ("eager", "'eager'"),
    (10**39, "1" + "0" * 39),
    (10**40, "an int of 41 digits"),
    (-(10**5000), "a negative int of 5001 digits"),
    (10**5000 - 1, "an int of 5000 digits"),
    (10**15 * 10**60 - 1, "an int of 75 digits"),
    (torch.tensor(4), "tensor(4)"),
    (torch.zeros(2, 3), "a Tensor of shape (2, 3) and dtype torch.float32"),
    (np.zeros(100), "an ndarray of shape (100,) and dtype float64"),
    ("x" * 100, "a str of 100 characters that begins with 'xxxxxxxxxxxxxxxxxxxx'"),
    (list(range(100)), "a list of 100 elements"),
    ([1, 2], "[1, 2]"),
    ({10**5000}, "a set of 1 element"),
    (Unspeakable(), "an Unspeakable"),
    (LongWinded(), "a LongWinded"),
]


@pytest.mark.parametrize(("value", "text"), SHOWN, ids=[text for _, text in SHOWN])
def test_a_value_is_shown_whole_or_described(value, text: str):
    assert shown(value) == text


@pytest.mark.parametrize(
    ("bounds", "words"),
    [
        ([3, *range(4, 20)], "starts at 3"),
        ([*range(12), 5, *range(12, 38)], "falls from 11 to 5 at entry 12"),
        (list(range(30)), "ends at 29"),
    ],
)
def test_of_many_packed_bounds_the_wrong_one_is_shown(bounds: list[int], words: str):
    x = torch.zeros(37, 2, 4)
    with pytest.raises(ValueError, match=f"cu_seqlens must start at 0, never fall and end at 37 .*, but {words}$"):
        moba_attention_varlen(x, x, x, torch.tensor(bounds), block_size=4, top_k=2)


@pytest.mark.parametrize("value", [2.0, torch.tensor(2), np.int64(2)], ids=repr)
def test_what_passes_for_an_int_is_refused_with_the_remedy(value):
    with pytest.raises(ValueError, match=r"top_k must be an int of at least 1, but is .*: convert it with int\(\)$"):
        moba_attention(X, X, X, block_size=4, top_k=value)
