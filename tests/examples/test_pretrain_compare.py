"""`pretrain.py --compare`: a table and a picture of runs, with differences to full attention of the same seed."""

from __future__ import annotations

import json

import pretrain
import pytest
import torch
from pretraining.compare import differences, draw, draw_sweep, group, held_out, table
from shared.command_line import UserError
from support.pretrain_runs import logs


def test_the_table_has_differences_to_full_attention_of_the_same_seed(trained):
    ((title, runs),) = group(list(logs(trained).values())).items()
    assert "size toy, context 128" in title
    moba, found = "moba (16, top-3)", logs(trained)
    expected = [held_out(found[f"toy-128-moba-b16k3-seed{seed}"]) - held_out(found[f"toy-128-full-seed{seed}"]) for seed in (0, 1)]
    assert differences(runs, moba, held_out) == expected
    lines = table(runs)
    assert lines[2].startswith("| full |")
    (row,) = [line for line in lines if line.startswith(f"| {moba} |")]
    mean, deviation = sum(expected) / 2, abs(expected[0] - expected[1]) / 2**0.5
    assert f"{mean:+.4f} ± {deviation:.4f}" in row and row.endswith("| 0, 1 |")
    absolute = [held_out(found[f"toy-128-moba-b16k3-seed{seed}"]) for seed in (0, 1)]
    assert f"| {sum(absolute) / 2:.4f} ± {abs(absolute[0] - absolute[1]) / 2**0.5:.4f} |" in row


def test_compare_prints_and_plots(trained, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    pretrain.compare(sorted((trained / "logs").glob("*.json")), tmp_path / "losses.png")
    assert "moba-8-blocks (16, top-2)" in capsys.readouterr().out
    assert (tmp_path / "losses.png").stat().st_size > 20_000


# Made-up logs


def log_of(run: str, seed: int = 0, device: str = "H100", speed: int = 1000, **settings) -> dict:
    """A log of a run that was done on that device; each is a little different."""
    rule = {"size": "toy", "context": 1024, "run": run, "seed": seed, "needle_share": 0.0, **settings}
    loss = 2 + 0.1 * seed + 0.01 * settings.get("block_size", 0) / 16
    return {
        "settings": rule,
        "train": [[10, 3.0], [20, loss]],
        "held_out": [[20, loss]],
        "by_position": [loss] * 16,
        "trailing": loss,
        "tokens_per_second": [speed - 1, speed, speed + 500],
        "environment": {"device": device},
        "done": True,
    }


def test_speeds_of_different_devices_have_no_mean():
    ((_, runs),) = group([log_of("full", 0), log_of("full", 1, speed=3000), log_of("full", 2, "H200", 5000)]).items()
    assert "| 2,000 ± 1,414; 5,000 | H100; H200 | 0, 1, 2 |" in table(runs)[2]


def test_a_sweep_comes_in_the_order_of_its_blocks_and_is_drawn_over_them():
    figure = pytest.importorskip("matplotlib.figure").Figure()
    sweep = [log_of(f"moba-{n}-blocks", seed, block_size=1024 // n, top_k=n // 4) for n in (128, 8, 32) for seed in (0, 1)]
    ((_, runs),) = group([*sweep, log_of("moba", block_size=16, top_k=3), log_of("full", 0), log_of("full", 1)]).items()
    blocks = [f"moba-{n}-blocks ({1024 // n}, top-{n // 4})" for n in (8, 32, 128)]
    assert list(runs) == ["full", "moba (16, top-3)", *blocks]
    axes = figure.subplots()
    draw_sweep(axes, {name: (runs[name], differences(runs, name, held_out)) for name in blocks})
    assert axes.lines[0].get_xydata() == pytest.approx(torch.tensor([[8, 0.08], [32, 0.02], [128, 0.005]]).numpy(), rel=1e-5)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["8", "32", "128"]


def test_a_picture_of_a_sweep_has_no_curve_of_full_attention_alone(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure").Figure
    figures, save = [], figure.savefig
    monkeypatch.setattr(figure, "savefig", lambda self, *given, **more: (figures.append(self), save(self, *given, **more)))
    sweep = [log_of(f"moba-{n}-blocks", block_size=1024 // n, top_k=n // 4) for n in (8, 32)]
    draw(group([*sweep, log_of("full")]), tmp_path / "blocks.png")
    draw(group([*sweep, log_of("full"), log_of("moba", block_size=16, top_k=3)]), tmp_path / "both.png")
    alone, both = ([axes.get_title() for axes in figure.subfigs[0].axes] for figure in figures)
    assert alone == ["held-out text, by number of blocks"] and both == ["training", "held-out text, by position", *alone]
    assert figures[0].get_figwidth() < figures[1].get_figwidth()


def test_logs_of_several_folders_are_one_table_unless_two_of_them_are_the_same_run(tmp_path, capsys):
    undone = {**log_of("moba", 1, block_size=16, top_k=3), "done": False}
    for name, log in {"a": log_of("full"), "b": log_of("moba", block_size=16, top_k=3), "a again": log_of("full"), "c": undone}.items():
        (tmp_path / name).write_text(json.dumps(log))
    pretrain.compare(sorted(tmp_path.iterdir()))
    out = capsys.readouterr().out
    assert out.count("| run |") == 1 and "+0.0100" in out and "not done: 1 of the 4 runs" in out
    (tmp_path / "a again").write_text(json.dumps(log_of("full", device="H200")))
    with pytest.raises(UserError, match=r"two logs are of full, seed 0, with size toy, .*needle_share 0\.0, optimizer adamw: name one"):
        pretrain.compare(sorted(tmp_path.iterdir()))
