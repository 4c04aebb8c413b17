"""What a step of examples/experiments/pretrain.py is made of: models of a seed, graphs of their layers and of whole steps, optimizers."""

from __future__ import annotations

import copy

import pretrain
import pytest
import torch
from pretraining import captured
from pretraining.optimizer import Muon, MuonAndAdamW
from pretraining.runs import NAMES, SIZES, named, new_model, of_blocks
from shared.command_line import UserError
from shared.compiled_layers import compile_layers
from support.pretrain_runs import arguments, logs
from torch._dynamo.testing import CompileCounter
from transformers import LlamaConfig, LlamaForCausalLM

import moba_flex

pytestmark = pytest.mark.usefixtures("signals_as_before")


# Models


@pytest.mark.parametrize("size", [size for size in SIZES if size != "toy"])
def test_sizes_are_what_they_are_called(size):
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SIZES[size], vocab_size=8192, tie_word_embeddings=True))
    assert sum(x.numel() for x in model.parameters()) == pytest.approx(float(size[:-1]) * 1e6, rel=0.1)


def test_runs_of_a_seed_begin_with_the_same_weights():
    models = [new_model("toy", 300, 128, named(name, 16, 3), 0, torch.device("cpu")) for name in NAMES]
    expected = models[0].state_dict()
    for model in models:
        state = model.state_dict()
        assert all(torch.equal(state[name], x) for name, x in expected.items())
        assert all((x == 0).all() for name, x in state.items() if name not in expected)


def test_a_sweep_reads_the_same_share_of_the_blocks():
    assert [of_blocks(n, 32768).settings for n in (8, 32, 128)] == [
        {"block_size": 4096, "top_k": 2},
        {"block_size": 1024, "top_k": 8},
        {"block_size": 256, "top_k": 32},
    ]
    with pytest.raises(UserError, match="divide the context, 32768, but 12 is not"):
        of_blocks(12, 32768)


# Graphs


@pytest.mark.parametrize(("name", "kinds"), [("full", 1), ("moba-then-full", 2), ("moba-last-3-full", 2), ("moba-conv-3", 1)])
def test_all_layers_with_the_same_attention_share_a_graph(name, kinds):
    torch.compiler.reset()
    run = named(name, 16, 3)
    model = new_model("toy", 300, 128, run, 0, torch.device("cpu"))
    plain, graphs, ids = copy.deepcopy(model), CompileCounter(), torch.randint(300, (2, 129))
    compile_layers(model, backend=graphs)
    for step in range(4):
        for each in (model, plain):
            moba_flex.MobaSchedule(switch_at=run.switch_at).apply(each, 6 + step, 10)
        compiled, wanted = (pretrain.losses(each, ids, pretrain.losses_of_hidden) for each in (model, plain))
        torch.testing.assert_close(compiled, wanted)
    assert graphs.frame_count == kinds
    assert model.state_dict().keys() == plain.state_dict().keys()
    torch.compiler.reset()


def test_a_step_is_captured_once_it_has_run_twice_and_again_when_its_attention_changes(monkeypatch):
    ran = []

    class Graph:
        def __init__(self, function, model, ids):
            ran.append("capture")

        def __call__(self, ids):
            ran.append("replay")
            return ids.sum()

    def eager(ids):
        ran.append("eager")
        return ids.sum()

    monkeypatch.setattr(captured, "Graph", Graph)
    passes = captured.Passes(eager, torch.nn.Linear(1, 1))
    assert [passes(torch.tensor([i]), kind=i < 4).item() for i in range(8)] == list(range(8))
    assert ran == ["eager", "eager", "capture", "replay", "replay"] * 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: only there steps are captured")
@pytest.mark.parametrize("name", ["full", "moba-then-full", "moba-conv-3"])
def test_captured_steps_have_the_losses_of_others(text, tmp_path, monkeypatch, name):
    """Two parts a step, so that gradients add up within a graph; on a GPU not all sums are of one order, so not to the bit."""
    replays = []
    replay = captured.Graph.__call__
    monkeypatch.setattr(captured.Graph, "__call__", lambda self, ids: replays.append(0) or replay(self, ids))
    losses = []
    for more in ([], ["--no-step-graphs"]):
        args = arguments(tmp_path / str(len(more)), text, "--runs", name, "--tokens", str(256 * 60), *more)
        args.cpu = False
        assert pretrain.pretrain(args) == 0
        (log,) = logs(tmp_path / str(len(more))).values()
        losses.append([loss for _, loss in log["train"] + log["held_out"]])
        steps = {"full": (0, 58), "moba-then-full": (52, 56), "moba-conv-3": (58, 58)}  # all but two of each attention
        assert len(replays) == steps[name][pretrain.CAPTURES_FULL]
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)
    assert losses[0][0] > losses[0][5]


# Optimizers


def test_matrices_taken_together_move_as_pytorchs_muon_moves_each():
    shapes, generator = [(8, 8), (16, 8), (8, 8), (8, 24), (16, 8)], torch.Generator().manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    theirs = [torch.nn.Parameter(x.detach().clone()) for x in ours]
    both = Muon(ours, 1e-2, 0.1), torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for x, y in zip(ours, theirs):
            x.grad = torch.randn(x.shape, generator=generator)
            y.grad = x.grad.clone()
        for optimizer in both:
            optimizer.step()
    for x, y in zip(ours, theirs):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3)  # in bfloat16, and a step is a hundredth


def test_muon_has_the_matrices_of_layers_and_only_matrices_decay():
    model = new_model("toy", 64, 128, named("moba-conv-3", 16, 3), 0, torch.device("cpu"))
    muon, adamw = MuonAndAdamW(model, 1e-3, 0.1)._optimizers
    name_of = {x: name for name, x in model.named_parameters()}
    in_muon = {name_of[x] for group in muon.param_groups for x in group["params"]}
    decayed, others = ({name_of[x] for x in group["params"]} for group in adamw.param_groups)
    assert in_muon | decayed | others == set(name_of.values())
    assert {name.split(".")[-2] for name in in_muon} == {f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")}
    assert decayed == {"model.embed_tokens.weight"}
    assert any("key_conv" in name for name in others) and any("norm" in name for name in others)
