"""Bad input gets one exception, before any work, that names the argument and says what it was."""

from __future__ import annotations

import re

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DeviceMesh, DTensor, Replicate
from torch.masked import MaskedTensor

from moba_flex import functional, moba_attention, moba_attention_varlen, select_blocks, set_working_memory

X = torch.zeros(2, 4, 8, 3)


def zeros(*shape: int, **options) -> torch.Tensor:
    return torch.zeros(*shape, **options)


def mask(*rows: str) -> torch.Tensor:
    return torch.tensor([[letter == "x" for letter in row] for row in rows])


def bounds(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


# What is wrong, what is raised, and what the message must hold. The rest of the call is sound.
BLOCKS = [
    *[
        ({name: value}, ValueError, [name, repr(value)])
        for name in ("block_size", "top_k")
        for value in (0, -3, 2.0, "8", None, True, torch.tensor(4))
    ],
    *[({name: value}, ValueError, [name, repr(value)]) for name in ("sink_blocks", "recent_blocks") for value in (-1, 1.5, None, False)],
    ({"top_k": 1, "sink_blocks": 1}, ValueError, ["top_k=1", "sink_blocks=1", "at least 2"]),
    ({"top_k": 2, "recent_blocks": 2}, ValueError, ["top_k=2", "recent_blocks=2", "at least 3"]),
    ({"top_k": 4, "sink_blocks": 2, "recent_blocks": 2}, ValueError, ["top_k=4", "sink_blocks=2", "recent_blocks=2"]),
    *[({"share_selection": value}, ValueError, ["share_selection", repr(value)]) for value in (1, None, "yes")],
    ({"causal": False, "sink_blocks": 1}, ValueError, ["sink_blocks", "causal=False", "1"]),
    ({"causal": False, "recent_blocks": 1}, ValueError, ["recent_blocks", "causal=False", "1"]),
]
QUERY_KEY = [
    *[({name: value}, TypeError, [name, type(value).__name__]) for name in ("query", "key") for value in ([[1.0]], 1.0, None, "text")],
    *[
        ({name: X.to(dtype)}, TypeError, [name, str(dtype)])
        for name in ("query", "key")
        for dtype in (torch.int64, torch.bool, torch.complex64)
    ],
    ({"key": X.half()}, TypeError, ["key", "torch.float16", "query", "torch.float32"]),
    ({"query": X.bfloat16()}, TypeError, ["query", "torch.bfloat16"]),
    ({"key": X.to("meta")}, ValueError, ["key", "meta", "query", "cpu"]),
    ({"query": zeros(4, 8, 3)}, ValueError, ["query", "4 dimensions", "(4, 8, 3)"]),
    ({"key": zeros(1, 2, 4, 8, 3)}, ValueError, ["key", "4 dimensions", "(1, 2, 4, 8, 3)"]),
    ({"query": zeros(3, 4, 8, 3)}, ValueError, ["query", "(3, 4, 8, 3)", "key", "(2, 4, 8, 3)", "batch"]),
    ({"query": zeros(2, 4, 8, 5)}, ValueError, ["query", "(2, 4, 8, 5)", "key", "(2, 4, 8, 3)", "width"]),
    ({"query": zeros(2, 6, 8, 3)}, ValueError, ["query", "6 heads", "multiple", "4"]),
    ({"query": zeros(2, 2, 8, 3)}, ValueError, ["query", "2 heads", "multiple", "4"]),
    (
        {"query": zeros(2, 4, 9, 3)},
        ValueError,
        ["query (2, 4, 9, 3)", "key (2, 4, 8, 3)", "(batch, heads, tokens, width)", "transpose(1, 2)"],
    ),
    *[({name: X.to_sparse()}, TypeError, [name, "torch.sparse_coo", ".to_dense()"]) for name in ("query", "key")],
    *[({"padding_mask": value}, TypeError, ["padding_mask", type(value).__name__]) for value in ([[True] * 8] * 2, True)],
    ({"padding_mask": torch.ones(2, 8)}, TypeError, ["padding_mask", "bool", "torch.float32"]),
    ({"padding_mask": torch.ones(2, 8).long()}, TypeError, ["padding_mask", "bool", "torch.int64"]),
    ({"padding_mask": torch.ones(2, 7).bool()}, ValueError, ["padding_mask", "(2, 7)", "(2, 8)"]),
    ({"padding_mask": torch.ones(8).bool()}, ValueError, ["padding_mask", "(8,)", "(2, 8)"]),
    ({"padding_mask": torch.ones(2, 8).bool().to("meta")}, ValueError, ["padding_mask", "meta", "cpu"]),
    ({"padding_mask": mask("xxxxxxxx", "xx.xxxxx")}, ValueError, ["padding_mask", "hole", "row 1"]),
    ({"padding_mask": mask("..x..x..", "xxxxxxxx")}, ValueError, ["padding_mask", "hole", "row 0"]),
    ({"padding_mask": mask("xxxxxxxx", "x......x")}, ValueError, ["padding_mask", "hole", "row 1"]),
]
VALUE = [
    *[({"value": value}, TypeError, ["value", type(value).__name__]) for value in ([[1.0]], 1.0, None)],
    ({"value": X.int()}, TypeError, ["value", "torch.int32"]),
    ({"value": X.double()}, TypeError, ["value", "torch.float64", "query", "torch.float32"]),
    ({"value": X.to("meta")}, ValueError, ["value", "meta", "cpu"]),
    ({"value": X[0]}, ValueError, ["value", "4 dimensions", "(4, 8, 3)"]),
    ({"value": zeros(1, 4, 8, 3)}, ValueError, ["value", "(1, 4, 8, 3)", "key", "(2, 4, 8, 3)"]),
    ({"value": zeros(2, 2, 8, 3)}, ValueError, ["value", "(2, 2, 8, 3)", "key", "(2, 4, 8, 3)"]),
    ({"value": zeros(2, 4, 7, 3)}, ValueError, ["value", "(2, 4, 7, 3)", "key", "(2, 4, 8, 3)"]),
]
SCORES = [
    ({"scale": "1"}, TypeError, ["scale", "str"]),
    ({"scale": torch.tensor(1.0)}, TypeError, ["scale", "Tensor"]),
    ({"scale": True}, TypeError, ["scale", "bool"]),
    *[({"scale": value}, ValueError, ["scale", "float32", repr(value)]) for value in (1e39, -1e39)],
    *[({"softcap": value}, ValueError, ["softcap", repr(value)]) for value in (0, 0.0, -1.0, "30", float("nan"), True, 1e39, 1e-46)],
    ({"sinks": [0.0] * 4}, TypeError, ["sinks", "list"]),
    ({"sinks": torch.zeros(4).long()}, TypeError, ["sinks", "torch.int64"]),
    ({"sinks": zeros(3)}, ValueError, ["sinks", "(3,)", "(4,)"]),
    ({"sinks": zeros(1, 4)}, ValueError, ["sinks", "(1, 4)", "(4,)"]),
    ({"sinks": zeros(4, device="meta")}, ValueError, ["sinks", "meta", "cpu"]),
    ({"implementation": "fast"}, ValueError, ["implementation", "'fast'", "eager", "naive", "flex", "auto"]),
    ({"implementation": None}, ValueError, ["implementation", "None"]),
    ({"implementation": "flex"}, ValueError, ["implementation", "flex", "CUDA", "cpu"]),
    *[({"return_lse": value}, ValueError, ["return_lse", "True or False", repr(value)]) for value in (1, None, "no")],
]
P = torch.zeros(8, 4, 3)
PACKED = [
    *[
        ({name: value}, TypeError, [name, type(value).__name__])
        for name in ("query", "key", "value", "cu_seqlens")
        for value in ([0, 8], 1.0, None)
    ],
    *[({name: P.long()}, TypeError, [name, "torch.int64"]) for name in ("query", "key", "value")],
    ({"key": P.half()}, TypeError, ["key", "torch.float16", "query", "torch.float32"]),
    ({"value": P.to("meta")}, ValueError, ["value", "meta", "cpu"]),
    ({"query": X}, ValueError, ["query", "3 dimensions", "(2, 4, 8, 3)"]),
    ({"key": X}, ValueError, ["key", "3 dimensions", "(2, 4, 8, 3)"]),
    ({"value": P[0]}, ValueError, ["value", "3 dimensions", "(4, 3)"]),
    ({"key": P[:7], "value": P[:7]}, ValueError, ["key", "(7, 4, 3)", "query", "(8, 4, 3)"]),
    ({"value": P[:7]}, ValueError, ["value", "(7, 4, 3)"]),
    ({"value": P[:, :2]}, ValueError, ["value", "(8, 2, 3)", "key", "(8, 4, 3)"]),
    ({"query": zeros(8, 4, 2)}, ValueError, ["query", "(8, 4, 2)", "key", "(8, 4, 3)"]),
    ({"query": zeros(8, 6, 3)}, ValueError, ["query", "6 heads", "multiple", "4"]),
    ({"cu_seqlens": bounds(1, 8)}, ValueError, ["cu_seqlens", "start at 0", "[1, 8]"]),
    ({"cu_seqlens": bounds(-1, 8)}, ValueError, ["cu_seqlens", "start at 0", "[-1, 8]"]),
    ({"cu_seqlens": bounds(0, 5, 3, 8)}, ValueError, ["cu_seqlens", "never fall", "[0, 5, 3, 8]"]),
    ({"cu_seqlens": bounds(0, 9, 8)}, ValueError, ["cu_seqlens", "never fall", "[0, 9, 8]"]),
    ({"cu_seqlens": bounds(0, 7)}, ValueError, ["cu_seqlens", "end at 8", "[0, 7]"]),
    ({"cu_seqlens": bounds(0, 5, 9)}, ValueError, ["cu_seqlens", "end at 8", "[0, 5, 9]"]),
    ({"cu_seqlens": bounds(0)}, ValueError, ["cu_seqlens", "end at 8", "[0]"]),
    ({"cu_seqlens": bounds()}, ValueError, ["cu_seqlens", "(0,)"]),
    ({"cu_seqlens": bounds(0, 8)[None]}, ValueError, ["cu_seqlens", "one dimension", "(1, 2)"]),
    ({"cu_seqlens": bounds(0, 8).float()}, TypeError, ["cu_seqlens", "torch.float32"]),
    ({"cu_seqlens": bounds(0, 8).to("meta")}, ValueError, ["cu_seqlens", "meta", "cpu"]),
]
PACKED_KEYS = [
    *[({"cu_seqlens_k": value}, TypeError, ["cu_seqlens_k", type(value).__name__]) for value in ([0, 20], 1.0)],
    ({"cu_seqlens_k": None}, ValueError, ["query", "(8, 4, 3)", "key", "(20, 4, 3)", "cu_seqlens_k"]),
    ({"cu_seqlens_k": bounds(1, 9, 9, 20)}, ValueError, ["cu_seqlens_k", "start at 0", "[1, 9, 9, 20]"]),
    ({"cu_seqlens_k": bounds(0, 9, 8, 20)}, ValueError, ["cu_seqlens_k", "never fall", "[0, 9, 8, 20]"]),
    ({"cu_seqlens_k": bounds(0, 9, 9, 19)}, ValueError, ["cu_seqlens_k", "end at 20", "[0, 9, 9, 19]"]),
    ({"cu_seqlens_k": bounds(0, 9, 9, 20).float()}, TypeError, ["cu_seqlens_k", "torch.float32"]),
    ({"cu_seqlens_k": bounds(0, 9, 20)}, ValueError, ["cu_seqlens", "cu_seqlens_k", "equally many sequences", "3", "2"]),
    ({"cu_seqlens_k": bounds(0, 9, 9, 20)[None]}, ValueError, ["cu_seqlens_k", "one dimension", "(1, 4)"]),
    ({"cu_seqlens_k": bounds(0, 9, 9, 20).to("meta")}, ValueError, ["cu_seqlens_k", "meta", "cpu"]),
    ({"cu_seqlens_k": bounds(0, 4, 9, 20)}, ValueError, ["cu_seqlens_k", "cu_seqlens", "sequence 0", "5 queries", "4 keys"]),
    ({"cu_seqlens_k": bounds(0, 18, 18, 20)}, ValueError, ["cu_seqlens_k", "cu_seqlens", "sequence 2", "3 queries", "2 keys"]),
    ({"cu_seqlens": bounds(0, 5, 6, 8)}, ValueError, ["cu_seqlens_k", "cu_seqlens", "sequence 1", "1 queries", "0 keys"]),
    ({"cu_seqlens": bounds(0, 5, 5, 7)}, ValueError, ["cu_seqlens", "end at 8", "[0, 5, 5, 7]"]),
    ({"key": P}, ValueError, ["key", "(8, 4, 3)", "value", "(20, 4, 3)"]),
]


def each(*wrongs: tuple[dict, type[Exception], list[str]]) -> pytest.MarkDecorator:
    def shown(value) -> str:
        return f"{value.dtype}{tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)

    names = [", ".join(f"{name}={shown(value)}" for name, value in wrong.items()) for wrong, _, _ in wrongs]
    return pytest.mark.parametrize(("wrong", "error", "said"), wrongs, ids=names)


def check(function, sound: dict, wrong: dict, error: type[Exception], said: list[str]) -> None:
    function(**sound)  # what is wrong is what is changed
    with pytest.raises(error) as raised:
        function(**{**sound, **wrong})
    assert raised.type is error
    message = str(raised.value)
    assert "\n" not in message
    missing = [part for part in said if not re.search(rf"(?<![\w.]){re.escape(part)}(?![\w])", message)]
    assert not missing, f"{missing} not in: {message}"


@pytest.fixture
def no_work(monkeypatch):
    """From its second call on, the operation itself must not be reached."""
    attend, calls = functional.attend, []

    def once(*args, **settings):
        assert not calls, "work began before the error"
        calls.append(1)
        return attend(*args, **settings)

    monkeypatch.setattr(functional, "attend", once)


@each(*BLOCKS, *QUERY_KEY, *VALUE, *SCORES)
def test_moba_attention_names_the_argument_that_is_wrong(no_work, wrong, error, said):
    check(moba_attention, {"query": X, "key": X, "value": X, "block_size": 4, "top_k": 5}, wrong, error, said)


@each(*PACKED, *BLOCKS, *SCORES)
def test_moba_attention_varlen_names_the_argument_that_is_wrong(no_work, wrong, error, said):
    sound = {"query": P, "key": P, "value": P, "cu_seqlens": bounds(0, 5, 5, 8), "block_size": 4, "top_k": 5}
    check(moba_attention_varlen, sound, wrong, error, said)


@each(*PACKED_KEYS)
def test_moba_attention_varlen_names_the_bounds_of_keys_that_are_wrong(no_work, wrong, error, said):
    sound = {"query": P, "key": zeros(20, 4, 3), "value": zeros(20, 4, 3), "block_size": 4, "top_k": 5}
    sound |= {"cu_seqlens": bounds(0, 5, 5, 8), "cu_seqlens_k": bounds(0, 9, 9, 20)}
    check(moba_attention_varlen, sound, wrong, error, said)


@each(*BLOCKS, *QUERY_KEY)
def test_select_blocks_names_the_argument_that_is_wrong(wrong, error, said):
    check(select_blocks, {"query": X, "key": X, "block_size": 4, "top_k": 5}, wrong, error, said)


@pytest.mark.parametrize("name", ["scale", "softcap"])
def test_a_number_that_no_float_holds_is_refused_in_a_short_sentence(name):
    with pytest.raises(ValueError, match=rf"{name} must be .*float32.* is an int of 401 digits$") as raised:
        moba_attention(X, X, X, block_size=4, top_k=2, **{name: 10**400})
    assert len(str(raised.value)) < 120


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
@pytest.mark.parametrize("function", [moba_attention, select_blocks])
def test_nested_tensors_are_sent_to_the_function_for_packed_sequences(function, layout):
    nested = torch.nested.nested_tensor([torch.zeros(n, 2, 3) for n in (5, 7)], layout=layout)
    count = 3 if function is moba_attention else 2
    for x in (nested, nested.transpose(1, 2)):
        with pytest.raises(
            TypeError, match=r"query must be .* but is a nested one.*moba_attention_varlen with x\.values\(\).*x\.offsets\(\)"
        ):
            function(*[x] * count, block_size=4, top_k=2)
    if layout is torch.jagged:  # which is what the message says
        out = moba_attention_varlen(*[nested.values()] * 3, nested.offsets(), block_size=4, top_k=2)
        assert out.shape == (12, 2, 3)


@pytest.fixture
def distributed():
    """`as_dtensor`, in a process group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = DeviceMesh("cpu", [0])
    yield lambda x: DTensor.from_local(x, mesh, [Replicate()])
    dist.destroy_process_group()


def masked(x: torch.Tensor) -> MaskedTensor:
    return MaskedTensor(x, torch.ones_like(x, dtype=torch.bool))


def test_tensors_of_other_kinds_are_named_and_how_to_convert_them(distributed):
    blocks = {"block_size": 4, "top_k": 2}
    real, lengths = torch.ones(2, 8, dtype=torch.bool), bounds(0, 8)
    for convert, words in ((distributed, r"is a DTensor: .*\.to_local\(\)"), (masked, r"is a MaskedTensor: .*\.to_tensor\(0\)")):
        for name, call in {
            "query": lambda x: moba_attention(x(X), x(X), x(X), **blocks),
            "key": lambda x: moba_attention(X, x(X), X, **blocks),
            "value": lambda x: moba_attention_varlen(P, P, x(P), lengths, **blocks),
            "padding_mask": lambda x: moba_attention(X, X, X, padding_mask=x(real), **blocks),
            "sinks": lambda x: moba_attention(X, X, X, sinks=x(torch.zeros(4)), **blocks),
            "cu_seqlens": lambda x: moba_attention_varlen(P, P, P, x(lengths), **blocks),
            "cu_seqlens_k": lambda x: moba_attention_varlen(P, P, P, lengths, cu_seqlens_k=x(lengths), **blocks),
        }.items():
            with pytest.raises(TypeError, match=rf"^{name} must be .* {words}"):
                call(convert)
        with pytest.raises(TypeError, match=rf"^query must be .* {words}"):
            select_blocks(convert(X), X, **blocks)


@pytest.mark.parametrize("function", [moba_attention, moba_attention_varlen, select_blocks])
def test_settings_are_named_and_block_size_and_top_k_have_no_default(function):
    with pytest.raises(TypeError):
        function(X, X, X, 4, 5)
    tensors = (P, P, P, bounds(0, 8)) if function is moba_attention_varlen else (X,) * (2 + (function is moba_attention))
    for settings in ({"block_size": 4}, {"top_k": 5}):
        with pytest.raises(TypeError, match="top_k" if "block_size" in settings else "block_size"):
            function(*tensors, **settings)


@pytest.mark.parametrize("n_bytes", [0, -1, 1.5, "1GB", None, True], ids=repr)
def test_set_working_memory_names_the_argument_that_is_wrong_and_changes_nothing(n_bytes):
    before = set_working_memory()
    try:
        with pytest.raises(ValueError, match=rf"n_bytes.*{re.escape(repr(n_bytes))}"):
            set_working_memory(n_bytes)
        assert set_working_memory() == functional.DEFAULT_WORKING_MEMORY
    finally:
        set_working_memory(before)


@pytest.mark.parametrize("mask_rows", [("xxxx....", "....xxxx"), ("........", "xxxxxxxx"), ("..xxxx..", "...x....")])
def test_one_run_of_real_tokens_is_no_hole(mask_rows):
    moba_attention(X, X, X, block_size=4, top_k=2, padding_mask=mask(*mask_rows))


def test_an_int64_cu_seqlens_is_taken_too():
    assert moba_attention_varlen(P, P, P, bounds(0, 3, 8, dtype=torch.int64), block_size=4, top_k=2).shape == P.shape
