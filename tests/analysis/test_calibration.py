"""`moba_flex.calibrate`: the right settings for models of known answers, honest figures, the model as it was, and a file to go on from."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product

import pytest
import torch
import transformers
from support.calibration import loss, stopped_after
from support.copying_models import copying_model, far_texts, near_texts
from transformers import BertConfig, BertModel, LlamaModel

import moba_flex
from moba_flex import Calibration, MobaConfig, calibrate, patch, set_attention
from moba_flex.analysis.calibration import measure, saved, search
from moba_flex.analysis.calibration.space import Space, default_block_sizes, default_budgets, is_dominated_by
from moba_flex.analysis.calibration.texts import with_facts

COPIES = 2  # the layer that does
SIZES = {"block_sizes": [4, 8], "budgets": [24, 48]}


@pytest.fixture(autouse=True)
def _no_progress_bar():
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


def space(texts, block_sizes=None, budgets=None) -> Space:
    length, template = texts.shape[1], MobaConfig(top_k=4, sink_blocks=1)
    return Space(
        template, length, (0, 1, 2, 3), tuple(block_sizes or default_block_sizes(length)), tuple(budgets or default_budgets(length))
    )


# Known answers


def test_the_one_layer_that_copies_from_afar_stays_full():
    report = calibrate(copying_model(COPIES), far_texts(6))
    assert report.config.full_attention_layers == (COPIES,)
    assert max(report.layers, key=report.layers.get) == COPIES and report.layers[COPIES] > 0.1
    assert all(abs(gain) < 1e-3 for layer, gain in report.layers.items() if layer != COPIES)


def test_a_model_that_reads_near_tokens_gets_the_smallest_budget_and_no_full_layer():
    texts = near_texts(6)
    report = calibrate(copying_model(COPIES), texts)
    of = space(texts)
    least = min(of.share(config) for config in of.blocks(of.template))
    chosen = report.candidates[report.chosen]
    assert chosen.share_of_keys == pytest.approx(least) and chosen.config.full_attention_layers == ()
    assert not report.layers, "no layer had to be measured"


def test_it_finds_what_a_full_grid_finds():
    """Among all blocks, budgets and groups of layers."""
    model, texts = copying_model(COPIES), far_texts(6)
    report = calibrate(model, texts, **SIZES)
    of = space(texts, **SIZES)
    full = {i: loss(model, texts[i]) for i in (1, 2, 4, 5)}
    costs = []
    groups = [tuple(n for n in range(4) if bits >> n & 1) for bits in range(16)]
    for blocks, layers in product(of.blocks(of.template), [group for group in groups if len(group) <= 2]):
        config = MobaConfig.from_dict({**blocks.to_dict(), "full_attention_layers": list(layers)})
        patch(model, config)
        if sum(loss(model, texts[i]) - full[i] for i in full) / len(full) <= 0.02:
            costs.append(of.share(config))
    assert report.candidates[report.chosen].share_of_keys == pytest.approx(min(costs))


def test_what_it_says_is_what_the_model_does():
    model, texts = copying_model(COPIES), far_texts(6)
    report = calibrate(model, texts)
    chosen = report.candidates[report.chosen]
    full = torch.tensor([loss(model, texts[i]) for i in (1, 2, 4, 5)])
    assert report.full_loss == pytest.approx(full.mean().item(), abs=1e-5)
    patch(model, report.config)
    lost = torch.tensor([loss(model, texts[i]) for i in (1, 2, 4, 5)]) - full
    assert chosen.held_out.difference == pytest.approx(lost.mean().item(), abs=1e-5)
    assert chosen.held_out.spread == pytest.approx(lost.std().item() / 2, abs=1e-5)
    shares = [layer.share_of_keys for layer in moba_flex.describe(model, length=256).layers]
    assert chosen.share_of_keys == pytest.approx(sum(shares) / len(shares))


@pytest.mark.parametrize("cost", ["time", "keys"])
def test_the_cheapest_candidate_comes_first_and_each_cost_is_reported(cost):
    report = calibrate(copying_model(COPIES), near_texts(3), cost=cost, block_sizes=[8, 16], budgets=[24])
    costs = [c.seconds if cost == "time" else c.share_of_keys for c in report.candidates]
    assert costs == sorted(costs)
    assert all((c.seconds is None or c.seconds > 0) and 0 < c.share_of_keys < 1 for c in report.candidates) and report.full_seconds > 0


def test_each_limit_is_kept():
    model, texts = copying_model(COPIES), far_texts(6)
    loose = calibrate(model, texts, within=5.0)
    assert loose.config.full_attention_layers == ()
    for limit in ({"last_quarter": 0.02}, {"agreement": 0.99}):
        report = calibrate(model, texts, within=5.0, **limit)
        assert report.config.full_attention_layers == (COPIES,), limit
        part = report.candidates[report.chosen].held_out
        assert part.last_quarter <= 0.02 and part.agreement >= 0.99


def test_where_nothing_keeps_the_limits_there_are_no_settings():
    texts = far_texts(6)
    report = calibrate(copying_model(0, n_layers=1), texts)  # its one layer would have to be full, which is no MoBA
    assert report.config is None and report.chosen is None and "No settings keep the limits" in report.table()


@pytest.mark.parametrize("far", [[1, 2, 4, 5], [4]], ids=["all", "one"])
def test_layers_are_ranked_again_on_a_text_that_fails(far):
    """Of the texts that are set aside some copy from afar; those that are searched with do not."""
    texts = near_texts(6)
    texts[far] = far_texts(6)[far]
    report = calibrate(copying_model(COPIES), texts)
    assert report.n_checked > 1 and report.deciding in far
    assert report.config.full_attention_layers == (COPIES,) and max(report.layers, key=report.layers.get) == COPIES
    chosen = report.candidates[report.chosen]
    assert chosen.held_out.n_texts == 4 and chosen.held_out.difference + chosen.held_out.spread <= 0.02
    assert chosen.search.n_texts == 2 and set(chosen.texts) == set(range(6))
    assert f"layers were ranked again on text {report.ranked[-1]}, which was set aside" in report.table()


@pytest.mark.parametrize("spread", [False, True])
def test_texts_that_were_not_read_count_as_the_least_that_they_can(spread):
    """No losses of 0 or more in their place use less of the limits: so a search that stops early loses nothing."""
    generator = torch.Generator().manual_seed(0)
    full = measure.Reading(0.0, 0.0, 1.0, None)
    limits = search.Limits(0.02, last_quarter=0.1, agreement=0.9)
    for _ in range(200):
        n = int(torch.randint(1, 8, (), generator=generator))
        lost = torch.rand(n, generator=generator, dtype=torch.float64).pow(4).tolist()
        pairs = [(measure.Reading(x, 2 * x, 1 - x, None), full) for x in lost]
        whole = limits.used(pairs, n, spread)
        for k in range(1, n):
            worst_first = sorted(pairs, key=lambda pair: -pair[0].loss)
            assert limits.used(worst_first[:k], n, spread) <= whole + 1e-9


def test_less_is_fewer_keys_larger_blocks_and_fewer_full_layers():
    config = MobaConfig(block_size=32, top_k=16, sink_blocks=1, full_attention_layers=(1, 2))
    below = [{}, {"top_k": 8}, {"block_size": 64, "top_k": 8}, {"full_attention_layers": (2,)}]
    others = [{"top_k": 17}, {"block_size": 16, "top_k": 32}, {"block_size": 64, "top_k": 9}, {"full_attention_layers": (2, 3)}]
    others += [{"sink_blocks": 0}, {"recent_blocks": 1}, {"share_selection": True}]
    assert all(is_dominated_by(replace(config, **change), config) for change in below)
    assert not any(is_dominated_by(replace(config, **change), config) for change in others)


# Warnings


def test_too_few_and_too_short_texts_are_told():
    report = calibrate(copying_model(COPIES), near_texts(2), **SIZES)
    assert any("1 texts set aside are too few" in sentence for sentence in report.warnings)
    assert any("texts of 256 tokens say little of longer ones" in sentence for sentence in report.warnings)
    assert all(f"warning: {sentence}" in report.table() for sentence in report.warnings)
    enough = calibrate(copying_model(COPIES), near_texts(6, 1024), **SIZES)
    assert not any("too few" in sentence or "longer ones" in sentence for sentence in enough.warnings)


# The model


def state(model) -> tuple:
    settings = json.dumps(model.config.to_dict(), sort_keys=True, default=str)
    flags = [(module.training, len(module._forward_pre_hooks), len(module._forward_hooks)) for module in model.modules()]
    marks = [dict(module.__dict__.get("_moba").__dict__) if "_moba" in module.__dict__ else None for module in model.modules()]
    return settings, flags, [str(mark) for mark in marks], [x.requires_grad for x in model.parameters()], id(model.config)


@pytest.mark.parametrize("before", ["unpatched", "patched", "full", "one layer full"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(before, fails, monkeypatch):
    model, texts = copying_model(COPIES).train(), far_texts(3)
    model.lm_head.weight.requires_grad_(False)
    if before != "unpatched":
        patch(model, block_size=16, top_k=3, decode="sparse")
    if before != "patched" and before != "unpatched":
        set_attention(model, "full", layers=[1] if before == "one layer full" else None)
    was, random = state(model), torch.get_rng_state()
    logits = model(texts[:1]).logits
    if fails:
        monkeypatch.setattr(search, "standard_error", lambda values: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            calibrate(model, texts, **SIZES)
    else:
        calibrate(model, texts, **SIZES)
    assert state(model) == was and torch.equal(torch.get_rng_state(), random)
    assert torch.equal(model(texts[:1]).logits, logits)


# The file


def test_after_a_stop_it_goes_on_to_the_same_report(tmp_path, monkeypatch):
    model, texts, file = copying_model(COPIES), far_texts(6), tmp_path / "new folder" / "measured.json"
    whole = calibrate(model, texts, **SIZES)
    with stopped_after(11), pytest.raises(KeyboardInterrupt):
        calibrate(model, texts, file=file, **SIZES)
    assert len(json.loads(file.read_text())["measured"]) == 11
    rest = calibrate(model, texts, file=file, **SIZES)
    assert rest.config == whole.config and rest.full_loss == pytest.approx(whole.full_loss)
    assert [c.config for c in rest.candidates] == [c.config for c in whole.candidates]
    for one, other in zip(rest.candidates, whole.candidates):
        assert one.texts == pytest.approx(other.texts, abs=1e-6)
    assert rest.measured == whole.measured
    monkeypatch.setattr(measure.Meter, "_logits", lambda *args: pytest.fail("all of it is in the file"))
    assert calibrate(model, texts, file=file, **SIZES).to_dict() == rest.to_dict()


def test_a_file_of_another_model_or_text_is_refused(tmp_path):
    file = tmp_path / "measured.json"
    calibrate(copying_model(COPIES), near_texts(3), file=file, **SIZES)
    with pytest.raises(ValueError, match=r"cannot be continued: weights was .* and is .*; name another file, or remove it"):
        calibrate(copying_model(1), near_texts(3), file=file, **SIZES)
    with pytest.raises(ValueError, match="cannot be continued: texts was"):
        calibrate(copying_model(COPIES), far_texts(3), file=file, **SIZES)
    file.write_text("[1, 2")
    with pytest.raises(ValueError, match="holds no measurements of calibrate: name another file, or remove it"):
        calibrate(copying_model(COPIES), near_texts(3), file=file, **SIZES)


# The report


def test_a_report_is_saved_and_loaded(tmp_path):
    report = calibrate(copying_model(COPIES), far_texts(6), **SIZES)
    report.save(tmp_path / "report.json")
    loaded = Calibration.load(tmp_path / "report.json")
    assert loaded.to_dict() == report.to_dict() and loaded.config == report.config and loaded.table() == report.table()
    older = report.to_dict()
    del older["deciding"]
    for candidate in older["candidates"]:
        del candidate["texts"]
    assert Calibration.from_dict(older).config == report.config and Calibration.from_dict(older).table() and report.frontier()
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match=r"other.json holds no calibration: name a file that Calibration.save has written"):
        Calibration.load(tmp_path / "other.json")


def test_the_table_has_the_chosen_settings_and_the_figure_its_frontier():
    report = calibrate(copying_model(COPIES), far_texts(6))
    lines = str(report).splitlines()
    assert lines[0].startswith("LlamaForCausalLM, 256 tokens, on cpu: 2 texts to search with, 4 set aside; asked for: within 0.02")
    (row,) = [line for line in lines if line.startswith("* ") and "MobaConfig" not in line]
    assert f" {COPIES} " in row and "±" in row
    (panel,) = report.figure().axes
    assert len(panel.get_lines()[0].get_xdata()) == len(report.frontier())


# Facts


def test_facts_stand_in_a_text_that_keeps_its_length(byte_llama):
    tokenizer = transformers.AutoTokenizer.from_pretrained(byte_llama)
    ids = torch.tensor(tokenizer("All that is read. " * 200)["input_ids"])
    text = with_facts(ids, tokenizer, seed=0)
    assert len(text.ids) == len(ids) and len(text.answers) == 8
    written = tokenizer.decode(text.ids)
    for first, end in text.answers:
        question, value = tokenizer.decode(text.ids[:first]), tokenizer.decode(text.ids[first:end]).strip()
        key = question.rsplit("The secret code of ", 1)[1].removesuffix(" is")
        assert f"The secret code of {key} is {value}." in written[: -len("x")]


def test_facts_are_counted_and_a_limit_on_them_is_kept(byte_llama):
    model = transformers.AutoModelForCausalLM.from_pretrained(byte_llama)
    tokenizer = transformers.AutoTokenizer.from_pretrained(byte_llama)
    texts = [f"{i} tells nothing of what comes. " * 40 for i in range(3)]
    report = calibrate(model, texts, tokenizer=tokenizer, length=900, within=1.0, retrieval=1.0, **SIZES)
    assert report.facts["of"] > 0 and report.facts["full"] == report.facts["moba"] == 0, "a model of random weights finds none"
    assert any("full attention finds less than half of the facts" in sentence for sentence in report.warnings)


# Bad input


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"within": 0}, "within must be a number of nats above 0, such as 0.02, but is 0"),
        ({"within": -1.0}, "within must be a number of nats above 0, such as 0.02, but is -1.0"),
        ({"within": None}, "within must be a number of nats above 0, such as 0.02, but is None"),
        ({"within": float("nan")}, "within must be a number of nats above 0"),
        ({"agreement": 2}, "agreement must be a share from 0 to 1, but is 2"),
        ({"retrieval": 0.5}, "retrieval puts facts into the texts, which needs a tokenizer: give tokenizer=, or leave retrieval out"),
        ({"cost": "money"}, "cost must be one of auto, time, keys, but is 'money'"),
        ({"texts": []}, "texts has 0 texts, but at least 2 are needed, one to search with and one to check on: give more, or cut"),
        ({"texts": near_texts(1)}, "texts has 1 text, but at least 2 are needed"),
        ({"texts": near_texts(3)[:, :20]}, "texts of 20 tokens are too short: MoBA needs at least 64"),
        ({"texts": ["a", "b"]}, r"texts\[0\] is a string, and strings need a tokenizer: give tokenizer=, or token ids in place of texts"),
        ({"length": 999}, r"texts\[0\] has 256 tokens, but length is 999: leave it out, or give a smaller length"),
        ({"length": 0}, "length must be an int of at least 1, but is 0"),
        (
            {"block_sizes": [256]},
            "texts have 256 tokens, which is no more than one block of 256: give longer texts, or smaller block_sizes",
        ),
        ({"block_sizes": [64], "budgets": [256]}, "texts have 256 tokens, of which block_sizes=.* read all: give longer texts"),
        ({"block_sizes": []}, "block_sizes is empty: leave it out, or name some"),
        ({"budgets": [0]}, "each of budgets must be an int of at least 1, but is 0"),
        ({"within": 10**400}, "within must be a number of nats above 0, such as 0.02, but is an int of 401 digits"),
        ({"last_quarter": 10**400}, "last_quarter must be a number of nats above 0, such as 0.02, but is an int of 401 digits"),
        ({"block_sizes": 5}, "block_sizes must be a list or tuple of ints, but is 5"),
        ({"budgets": [[1]]}, r"budgets must be a list or tuple of ints, but is \[\[1\]\]"),
        ({"texts": near_texts(3) - 9}, r"texts\[0\] must be token ids from 0 to 18, those of LlamaForCausalLM, but has -"),
        ({"texts": near_texts(3) + 9}, r"texts\[0\] must be token ids from 0 to 18, those of LlamaForCausalLM, but has 2"),
        ({"texts": near_texts(3).to("meta")}, r"texts\[0\] must have values, which calibrate reads, but is on the meta device"),
        ({"model": copying_model(COPIES).to("meta")}, "LlamaForCausalLM must have weights, but is on the meta device: load it on a CPU"),
    ],
    ids=lambda value: str(value)[:80],
)
def test_bad_input_is_one_sentence_before_any_work(changes, said, monkeypatch):
    monkeypatch.setattr(measure.Meter, "_logits", lambda *args: pytest.fail("it has begun"))
    arguments = {"model": copying_model(COPIES), "texts": near_texts(3), **changes}
    with pytest.raises(ValueError, match=said):
        calibrate(**arguments)


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ("a text", "texts must be several texts, a list of strings or of token ids, but is 'a text': put it into a list"),
        ([torch.rand(9), torch.rand(9)], r"texts\[0\] must be a string or one row of token ids, ints, but is a Tensor"),
        ([None, None], r"texts\[0\] must be a string or token ids, but is None"),
        (torch.tensor(3), r"texts must be several texts, a list of strings or of token ids, but is tensor\(3\): put it into a list"),
    ],
    ids=["one text", "tensors of floats", "nothing", "one token"],
)
def test_texts_of_another_type_are_refused(texts, said):
    with pytest.raises(TypeError, match=said):
        calibrate(copying_model(COPIES), texts)


@pytest.mark.parametrize("tokenizer", ["gpt2", 5], ids=str)
def test_what_is_no_tokenizer_is_refused(tokenizer):
    with pytest.raises(TypeError, match=f"tokenizer must be one of transformers, but is {tokenizer!r}: load it with AutoTokenizer"):
        calibrate(copying_model(COPIES), near_texts(3), tokenizer=tokenizer)


def test_models_that_cannot_be_calibrated_are_named():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 32}
    with pytest.raises(ValueError, match="BertModel has no layer that MoBA can replace"):
        calibrate(BertModel(BertConfig(**sizes)), near_texts(3))
    with pytest.raises(
        ValueError, match="LlamaModel has no language-model head, so that it has no loss: load it with AutoModelForCausalLM"
    ):
        calibrate(LlamaModel(copying_model(0).config), near_texts(3))
    with pytest.raises(TypeError, match="model must be a transformers model, but is a str"):
        calibrate("Qwen/Qwen3-8B", near_texts(3))


# The name


@pytest.mark.parametrize(
    "first", ["import moba_flex.calibrate", "import moba_flex; moba_flex.calibrate", "from moba_flex.calibrate import main"]
)
def test_the_name_is_the_function_whatever_was_imported(fresh, first):
    code = f"import warnings\nwarnings.simplefilter('error', RuntimeWarning)\n{first}\n"
    code += "import moba_flex, inspect\nfrom moba_flex import calibrate\nassert inspect.isfunction(calibrate)\n"
    code += "import importlib\nimportlib.import_module('moba_flex.calibrate').main\nassert moba_flex.calibrate is calibrate\n"
    done = fresh.run(code)
    assert done.returncode == 0, done.stderr


# Layers that two passes share


def test_skipped_layers_change_no_bit():
    model, texts, configs = copying_model(COPIES), far_texts(2), []
    for layers in ((), (3,), (2,), (2, 3), (0, 2), (1,)):
        configs.append(MobaConfig(block_size=4, top_k=6, sink_blocks=1, full_attention_layers=layers))
    configs = [None, *configs, MobaConfig(block_size=8, top_k=3, sink_blocks=1, full_attention_layers=(2,)), None]
    found, skipped = [], []
    for reuse in (False, True):
        meter = measure.Meter(model, texts, saved.Saved(None, {}), lambda: None)
        if reuse:
            meter.reuse_layers()
            assert meter._prefix is not None
        readings = [meter.read(config, 0) for config in configs]
        found.append([(x.loss, x.last_quarter, x.agreement) for x in readings])
        skipped.append(sum(x.seconds is None for x in readings))
    assert found[0] == found[1] and skipped[0] == 0 and skipped[1] == 5
    assert all("forward" not in vars(layer) and not layer._forward_hooks for layer in model.model.layers)


def test_a_model_whose_layers_want_more_than_an_output_is_read_whole(monkeypatch):
    model = copying_model(COPIES)
    forward, state = type(model.model.layers[0]).forward, {}

    def with_a_side_effect(self, hidden_states, *args, **kwargs):
        state["n"] = state.get("n", 0) + 1
        return forward(self, hidden_states + (state["n"] % 4), *args, **kwargs)

    monkeypatch.setattr(type(model.model.layers[0]), "forward", with_a_side_effect)
    meter = measure.Meter(model, far_texts(1), saved.Saved(None, {}), lambda: None)
    meter.reuse_layers()
    assert meter._prefix is None


# Losses that are not finite, and files


def test_a_loss_of_full_attention_that_is_not_finite_is_one_sentence(tmp_path):
    model = copying_model(COPIES)
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    for _ in range(2):  # the second call reads it from the file
        with pytest.raises(
            ValueError, match=r"^the loss of full attention on texts\[0\] is not finite: load the model in bfloat16 or float32"
        ):
            calibrate(model, near_texts(3), file=tmp_path / "measured.json", **SIZES)


@pytest.mark.parametrize(
    "fails", [lambda config: True, lambda config: config.top_k * config.block_size <= 24], ids=["all", "small budgets"]
)
def test_settings_whose_loss_is_not_finite_fail(monkeypatch, tmp_path, fails):
    read = measure.Meter._read

    def broken(meter, config, text, timed):
        found = read(meter, config, text, timed)
        return found if config is None or not fails(config) else {**found, "loss": float("nan"), "last_quarter": float("nan")}

    monkeypatch.setattr(measure.Meter, "_read", broken)
    report = calibrate(copying_model(COPIES), near_texts(6), **SIZES)
    report.save(tmp_path / "found.json")
    assert Calibration.load(tmp_path / "found.json").table() == report.table()
    report.figure().savefig(tmp_path / "found.png")
    assert (report.config is None) == fails(MobaConfig(block_size=1024))
    assert report.config is None or not fails(report.config)
    assert all(x == float("inf") for candidate in report.candidates if fails(candidate.config) for x in candidate.texts.values())


ODD_FILES = [
    (5, TypeError, "file must be the name of a file, a str or a Path, but is 5"),
    (b"x", TypeError, "file must be the name of a file, a str or a Path, but is b'x'"),
    ("", ValueError, "file must be the name of a file, but is ''"),
    ("a\0b", ValueError, "file must be the name of a file, but is "),
    ("/proc/x.json", OSError, "/proc/x.json cannot be used: No such file or directory"),
    ("x" * 5000, OSError, "a str of 5000 characters that begins with 'xxxxxxxxxxxxxxxxxxxx' cannot be used: File name too long"),
]


@pytest.mark.parametrize(("file", "error", "said"), ODD_FILES, ids=[said for *_, said in ODD_FILES])
def test_what_is_no_file_is_told_before_anything_is_measured(monkeypatch, file, error, said):
    monkeypatch.setattr(measure.Meter, "read", lambda *_, **__: pytest.fail("something was measured"))
    report = Calibration("Llama", "cpu", 64, {"within": 0.1}, "keys", 1, 1, 1.0, 1.0, None, ())
    for call in (
        lambda: calibrate(copying_model(COPIES), near_texts(3), file=file),
        lambda: report.save(file),
        lambda: Calibration.load(file),
    ):
        with pytest.raises(error) as raised:
            call()
        assert said in str(raised.value)


def test_a_folder_is_no_file_and_nothing_is_left_beside_it(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    report = Calibration("Llama", "cpu", 64, {"within": 0.1}, "keys", 1, 1, 1.0, 1.0, None, ())
    for call in (lambda: calibrate(copying_model(COPIES), near_texts(3), file=folder), lambda: report.save(folder)):
        with pytest.raises(IsADirectoryError, match="folder cannot be used"):
            call()
    assert list(tmp_path.iterdir()) == [folder]


BROKEN = [
    {"chosen": 99},
    {"chosen": -1},
    {"chosen": True},
    {"chosen": 1.0},
    {"limits": 5},
    {"candidates": []},
    {"full_loss": None},
    {"facts": {}},
]


@pytest.mark.parametrize("changes", BROKEN, ids=str)
def test_a_report_that_does_not_fit_together_is_refused_when_it_is_read(tmp_path, changes):
    report = calibrate(copying_model(COPIES), near_texts(6), **SIZES)
    assert report.chosen is not None
    with pytest.raises(ValueError, match="this is no calibration"):
        Calibration.from_dict({**report.to_dict(), **changes})
    (tmp_path / "report.json").write_text(json.dumps({**report.to_dict(), **changes}))
    with pytest.raises(ValueError, match="holds no calibration"):
        Calibration.load(tmp_path / "report.json")
