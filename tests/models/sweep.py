"""What patching promises, for every class of transformers that can be built small.

`python tests/models/sweep.py` goes through all of them and prints each promise that is broken; with `--write docs/models.md` it writes the
list of classes between the page's two marks. `test_sweep.py` runs a part of it with the other tests.

A promise holds for what the unpatched model can do: where padding changes its answers, or a cache, that promise is left out.
"""

from __future__ import annotations

import argparse
import copy
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers
from support.small_models import MAPPINGS, TOKENS, NotBuilt, classes, inputs_of, small_model, tokens
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from moba_flex import full_attention, patch, set_attention, unpatch
from moba_flex.models.patch import find_layers

SPARSE = {"block_size": 8, "top_k": 2}
ALL_BLOCKS = {"block_size": 8, "top_k": 100, "implementation": "eager"}  # "auto" would call the attention that the model had
ONE_BLOCK = {"block_size": 64, "top_k": 2}
PADDING = 7
MARKS = "<!-- classes -->", "<!-- end of classes -->"


@dataclass
class Report:
    """What came out for one class. `state` is "accepted", "refused", "not built" or "broken"."""

    kind: str
    name: str
    state: str
    reason: str = ""
    kept: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)


class LeftOut(Exception):
    """The unpatched model does not do what a promise is about."""


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None, **kwargs) -> Tensor:
    return model(**inputs_of(model, ids, mask), **kwargs).logits


def must_equal(found: Tensor, expected: Tensor, what: str = "") -> None:
    assert torch.equal(found, expected), f"{what} differs by {float((found - expected).abs().max()):.3g}".strip()


def must_be_close(found: Tensor, expected: Tensor, what: str = "") -> None:
    largest = float(expected.abs().max())
    gap = float((found - expected).abs().max())
    assert gap <= 1e-4 * max(1.0, largest) + 1e-3 * largest, f"{what} differs by {gap:.3g} of {largest:.3g}".strip()


def full_is_unpatched(model: PreTrainedModel) -> None:
    """Bit for bit, by every way to full attention, with a cache and without, padded and not."""
    ids, mask = tokens(), left_padding()

    def answers() -> list[Tensor]:
        said = [logits(model, ids, use_cache=False), logits(model, ids, torch.ones_like(ids), use_cache=False)]
        said.append(logits(model, ids, mask, use_cache=False)[:, PADDING:])
        if (steps := attempt(lambda: in_steps(model, ids, (30, 1, 1)))) is not None:
            said.append(steps)
        return said

    before = answers()
    ways: dict[str, Callable[[], object]] = {
        "set_attention": lambda: set_attention(patch(model, **SPARSE), "full"),
        "full_attention_layers": lambda: patch(model, **SPARSE, full_attention_layers=replaceable(model)),
        "one block": lambda: patch(model, **ONE_BLOCK),
    }
    for way, change in ways.items():
        change()
        for found, expected in zip(answers(), before, strict=True):
            must_equal(found, expected, way)
    with full_attention(patch(model, **SPARSE)):
        for found, expected in zip(answers(), before, strict=True):
            must_equal(found, expected, "full_attention")
    unpatch(model)
    for found, expected in zip(answers(), before, strict=True):
        must_equal(found, expected, "unpatch")


def decoding_is_full(model: PreTrainedModel) -> None:
    """With `decode="full"` a token behind a prompt of one block reads what it read."""
    ids = tokens()
    before = attempt(lambda: in_steps(model, ids, (12, 1, 1, 1)))
    if before is None:
        raise LeftOut
    must_equal(in_steps(patch(model, block_size=6, top_k=2), ids, (12, 1, 1, 1)), before)


def all_blocks_are_full(model: PreTrainedModel) -> None:
    ids = tokens()
    before = logits(model, ids, use_cache=False)
    must_be_close(logits(patch(model, **ALL_BLOCKS), ids, use_cache=False), before)


def naive_is_sparse(model: PreTrainedModel) -> None:
    ids = tokens()
    before = logits(model, ids, use_cache=False)
    sparse = logits(patch(model, **SPARSE), ids, use_cache=False)
    assert not torch.equal(sparse, before), "MoBA was not used"
    must_be_close(logits(set_attention(model, "moba_naive"), ids, use_cache=False), sparse)


def padded_is_alone(model: PreTrainedModel) -> None:
    """On either side."""
    ids, short = tokens(1), TOKENS - PADDING
    sides = [(side, mask) for side, mask in (("left", left_padding()[:1]), ("right", left_padding()[:1].flip(1)))]

    def difference(mask: Tensor) -> tuple[Tensor, Tensor]:
        real = mask[0].bool()
        alone = ids[:, real]
        return logits(model, ids * mask, mask, use_cache=False)[:, real], logits(model, alone, torch.ones(1, short).long(), use_cache=False)

    kept = [(side, mask) for side, mask in sides if is_kept_unpatched(lambda mask=mask: difference(mask))]
    if not kept:
        raise LeftOut
    patch(model, **SPARSE)
    for side, mask in kept:
        must_be_close(*difference(mask), side)


def cached_is_recomputed(model: PreTrainedModel) -> None:
    ids = tokens()

    def difference() -> tuple[Tensor, Tensor]:
        return in_steps(model, ids, (20, 8, 1, 1, 1)), logits(model, ids[:, :31], use_cache=False)[:, 19:]

    agrees_unpatched(lambda: tuple(x[:, -4:] for x in difference()))
    patch(model, **SPARSE, decode="sparse")
    try:
        steps, whole = difference()
    except ValueError as error:
        if "cannot follow a custom mask function" in str(error):  # of a model that joins the tokens of an image
            raise LeftOut from None
        raise
    must_be_close(steps[:, -4:], whole[:, -4:])


def drafts_are_greedy(model: PreTrainedModel) -> None:
    """Tokens that an assistant drafts are those of greedy decoding. The unpatched model drafts well enough for many to be accepted."""
    ids, assistant = tokens(1), copy.deepcopy(model)

    def answer(**how: object) -> Tensor:
        return model.generate(**inputs_of(model, ids), max_new_tokens=12, do_sample=False, **how)

    def must_be_greedy(what: str) -> None:
        must_equal(answer(assistant_model=assistant), answer(), what)

    holds_in_both_ways_to_decode(model, must_be_greedy)


def static_is_growing(model: PreTrainedModel) -> None:
    """A padded batch gets the same tokens with a static cache as with a growing one."""
    if not model._supports_default_dynamic_cache():  # `generate` would ignore the static one
        raise LeftOut
    inputs = inputs_of(model, tokens(), left_padding())
    inputs.pop("decoder_attention_mask", None)  # `generate` puts a token before the padding

    def must_agree(what: str) -> None:
        static, growing = (
            model.generate(**inputs, max_new_tokens=4, do_sample=False, disable_compile=True, cache_implementation=implementation)
            for implementation in ("static", None)
        )
        must_equal(static, growing, what)

    holds_in_both_ways_to_decode(model, must_agree)


def trains(model: PreTrainedModel) -> None:
    """A step: the same parameters have gradients, which are those of the specification; with full attention those of before."""
    ids = tokens()

    def gradients(copy_of: PreTrainedModel) -> dict[str, Tensor]:
        copy_of.train()
        torch.manual_seed(0)  # of what some models do in training alone
        out = copy_of(**inputs_of(copy_of, ids), labels=ids, use_cache=False)
        out.loss.backward()
        return {name: p.grad for name, p in copy_of.named_parameters() if p.grad is not None}

    before = attempt(lambda: gradients(copy.deepcopy(model)))
    if before is None:
        raise LeftOut
    found = gradients(patch(copy.deepcopy(model), **SPARSE))
    others = sorted(name for name in found.keys() ^ before.keys() if "expert" not in name)  # experts that no token chose have none
    assert not others, f"gradients of {others[:4]}"
    wrong = [name for name, x in found.items() if not x.isfinite().all()]
    assert not wrong, f"gradients of {wrong[:4]} are not finite"
    naive = gradients(set_attention(patch(copy.deepcopy(model), **SPARSE), "moba_naive"))
    gap, size = ((sum(float(x.norm() ** 2) for x in many) ** 0.5) for many in ([found[n] - naive[n] for n in found], naive.values()))
    assert gap < 5e-3 * size, f"gradients differ from the specification's by {gap:.3g} of {size:.3g}"
    full = gradients(set_attention(patch(copy.deepcopy(model), **SPARSE), "full"))
    for name, x in full.items():
        must_equal(x, before[name], f"with full attention the gradient of {name}")


def is_causal(model: PreTrainedModel) -> None:
    ids = tokens()
    changed = ids.clone()
    changed[:, -1] = (ids[:, -1] - 2) % 61 + 3

    def difference() -> tuple[Tensor, Tensor]:
        return logits(model, ids, use_cache=False)[:, :-1], logits(model, changed, use_cache=False)[:, :-1]

    agrees_unpatched(difference)
    for way in ("moba", "full"):
        set_attention(patch(model, **SPARSE), way)
        must_be_close(*difference(), way)
    patch(model, **ONE_BLOCK)
    must_be_close(*difference(), "one block")


PROMISES: dict[str, Callable[[PreTrainedModel], None]] = {
    "full attention is the unpatched model, bit for bit": full_is_unpatched,
    "decoding with full attention is the unpatched model's, bit for bit": decoding_is_full,
    "all blocks are full attention": all_blocks_are_full,
    "the specification agrees": naive_is_sparse,
    "a padded row is the row alone": padded_is_alone,
    "with a cache as without": cached_is_recomputed,
    "drafts are greedy": drafts_are_greedy,
    "a static cache as a growing one": static_is_growing,
    "a training step": trains,
    "no token sees later ones": is_causal,
}


def left_padding() -> Tensor:
    mask = torch.ones(2, TOKENS, dtype=torch.int64)
    mask[:, :PADDING] = 0
    return mask


def replaceable(model: PreTrainedModel) -> list[int]:
    return sorted({layer.layer_idx for layer in find_layers(model)[1]})


def attempt(call: Callable[[], Tensor]) -> Tensor | None:
    """None for what the unpatched model cannot do."""
    try:
        return call()
    except Exception:
        return None


def is_kept_unpatched(difference: Callable[[], tuple[Tensor, ...]]) -> bool:
    try:
        must_be_close(*difference())
    except Exception:
        return False
    return True


def agrees_unpatched(difference: Callable[[], tuple[Tensor, ...]]) -> None:
    if not is_kept_unpatched(difference):
        raise LeftOut


def holds_in_both_ways_to_decode(model: PreTrainedModel, check: Callable[[str], None]) -> None:
    """`check`, which raises with the given words, of the patched model; LeftOut if it raises of the unpatched one."""
    try:
        check("")
    except Exception:
        raise LeftOut from None
    for decode in ("full", "sparse"):
        patch(model, **SPARSE, decode=decode)
        check(f'decode="{decode}"')


def in_steps(model: PreTrainedModel, ids: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """The logits of the last token of the first call and of all tokens of the others, which go on with its cache."""
    kwargs = inputs_of(model, ids)
    name = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    out, first, said = None, 0, []
    with torch.no_grad():
        for length in lengths:
            kwargs[name] = ids[:, first : first + length]
            given = {"past_key_values": out.past_key_values} if out is not None else {}
            if out is None and not model.config.is_encoder_decoder:
                given = {"past_key_values": DynamicCache(config=model.config)}
            out = model(**kwargs, **given, use_cache=True)
            said.append(out.logits if first else out.logits[:, -1:])
            first += length
    return torch.cat(said, 1)


def sweep(kind: str, model_class: type[PreTrainedModel], config_class: type[PreTrainedConfig], attention: str | None = None) -> Report:
    """Every promise for one class."""
    report = Report(kind, model_class.__name__, "accepted")
    try:
        model = small_model(model_class, config_class, attention)
    except NotBuilt as error:
        report.state, report.reason = "not built", str(error)
        return report
    try:
        patch(copy.deepcopy(model), **SPARSE)
    except ValueError as error:
        report.state, report.reason = "refused", str(error)
        return report
    for promise, check in PROMISES.items():
        try:
            check(copy.deepcopy(model))
            report.kept.append(promise)
        except LeftOut:
            report.left_out.append(promise)
        except Exception as error:
            report.state = "broken"
            report.broken[promise] = " ".join(f"{type(error).__name__}: {error}".split())[:240]
    return report


def table(reports: list[Report]) -> str:
    """Markdown: which classes are accepted, with what is left out, and which are refused."""
    lines = [f"Tried with transformers {transformers.__version__} by `python tests/models/sweep.py --write docs/models.md`.", ""]
    counts = {state: sum(r.state == state for r in reports) for state in ("accepted", "refused", "not built")}
    lines += [f"{counts['accepted']} classes are accepted and keep every promise, {counts['refused']} are refused by name,"]
    lines += [f"and {counts['not built']} could not be built small, so that nothing is known of them.", ""]
    for state, title in (("accepted", "Accepted"), ("refused", "Refused"), ("not built", "Not tried")):
        lines += [f"### {title}", ""]
        for kind in MAPPINGS:
            names = [f"`{r.name}`" for r in reports if r.kind == kind and r.state == state]
            if names:
                lines += [f"{kind.capitalize()}: {', '.join(names)}.", ""]
    return "\n".join(lines)


def run(only: list[str], attention: str | None) -> Iterator[Report]:
    for kind, model_class, config_class in classes():
        if not only or model_class.__name__ in only:
            yield sweep(kind, model_class, config_class, attention)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("only", nargs="*", help="names of classes; all by default")
    parser.add_argument("--attention", help='what models use before they are patched, "eager" say; by default transformers\' choice')
    parser.add_argument("--write", type=Path, help="write the list of classes into this page")
    arguments = parser.parse_args()
    if arguments.write and not arguments.write.is_file():
        parser.error(f"argument --write: {arguments.write} is no file, and the list goes into one")
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity(transformers.utils.logging.CRITICAL)
    torch.set_num_threads(1)
    reports = []
    for report in run(arguments.only, arguments.attention):
        reports.append(report)
        print(f"{report.state:9} {report.name}", *([report.reason] if report.state != "accepted" else []), flush=True)
        for promise, error in report.broken.items():
            print(f"    {promise}: {error}", flush=True)
        if report.left_out:
            print(f"    left out: {'; '.join(report.left_out)}", flush=True)
    states = [report.state for report in reports]
    print(", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)))
    if arguments.write:
        page = arguments.write.read_text(encoding="utf-8")
        before, _, rest = page.partition(MARKS[0])
        page = f"{before}{MARKS[0]}\n\n{table(reports)}\n{MARKS[1]}{rest.partition(MARKS[1])[2]}"
        arguments.write.write_text(page, encoding="utf-8")
    return states.count("broken")


if __name__ == "__main__":
    sys.exit(main())
