"""The files that `adapt.py` writes: results, logs, checkpoints and adapters."""

from __future__ import annotations

import argparse
import copy
import json
import platform
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
import transformers
from filelock import FileLock, Timeout
from peft import set_peft_model_state_dict
from safetensors.torch import save_file
from shared.changed_settings import changes
from shared.command_line import UserError, one_line
from shared.models import context_of
from shared.saved_results import check_writable, write
from transformers import PreTrainedModel

from adapting.runs import BLOCKS, attend, moba_config, new_adapter, trained, weights
from adapting.text import Text

SETTINGS = ("steps", "batch_size", "sequence_length", "rope_theta", "learning_rate", "warmup", "weight_decay", "clip", "rank")
SETTINGS += ("needle_share", "held_out", "seed", *BLOCKS, "full_layers")  # the names in results.json


class Output:
    """The files of all runs. Each is written atomically, except the logs, which may lack their end.

    Several processes may use the same folder. A process locks the run that it trains, and results.json while it reads and writes it. Locks
    are released when a process ends, in any way.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self._args, self._folder = args, args.output
        check_writable(self._folder)
        begun = [name for name in args.runs if (self._folder / name).exists()]
        if begun and not args.resume:
            raise UserError(f"--output {self._folder} has {', '.join(begun)} already: go on with --resume, or choose another folder")

    def start(self, text: Text) -> None:
        """Create results.json. If it exists, check that the text and all other settings that determine the losses are the same."""
        settings = {name: getattr(self._args, name) for name in SETTINGS}
        settings |= {"model": self._base, "text": text.fingerprint}
        device = torch.cuda.get_device_name(self._args.device) if self._args.device.startswith("cuda") else platform.machine()
        versions = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
        about = {"device": device, "versions": versions, "date": time.strftime("%Y-%m-%d")}
        with one_line("argument --output: cannot write to the folder"):
            self._folder.mkdir(parents=True, exist_ok=True)
        with self.results() as results:
            saved = results.setdefault("settings", settings)
            if changed := changes(saved, settings):
                raise UserError(f"--output {self._folder} has runs with other settings; these must not change: {changed}")
            results["held_out_files"] = text.held_out_files
            for name in self._args.runs:
                results["runs"].setdefault(name, about)

    @contextmanager
    def results(self) -> Iterator[dict]:
        """The content of results.json, which is written back after the `with`."""
        file = self._folder / "results.json"
        with FileLock(self._folder / "results.lock"):
            results = json.loads(file.read_text()) if file.exists() else {"runs": {}, "loss": {}}
            yield results
            write(file, results)

    def hold(self, name: str) -> AbstractContextManager:
        """Lock the run for a `with`."""
        with one_line("argument --output: cannot write to the folder"):
            (self._folder / name).mkdir(exist_ok=True)
        try:
            return FileLock(self._folder / name / "run.lock").acquire(timeout=0)
        except Timeout:
            raise UserError(f"another process is at work on {self._folder / name}: leave {name} out of --runs, or wait") from None

    @property
    def _base(self) -> str:
        base = self._args.model or "HuggingFaceTB/SmolLM2-135M-Instruct"
        return Path(base).name if Path(base).exists() else base  # a local path means nothing to other users

    def adapter(self, name: str) -> Path:
        return self._folder / name / "adapter"

    def resume(self, name: str, base: PreTrainedModel):
        """The run's model, its optimizer and the index of the next step."""
        args, path = self._args, self._folder / name / "checkpoint.pt"
        model = attend(new_adapter(base, args.rank, args.seed), name, args).train()
        optimizer = torch.optim.AdamW(trained(model), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=args.weight_decay, fused=True)
        step = 0
        if path.exists():
            saved = torch.load(path, map_location=base.device)
            set_peft_model_state_dict(model, saved["adapter"])
            optimizer.load_state_dict(saved["optimizer"])
            step = saved["step"]
        self._keep_log(name, step)
        return model, optimizer, step

    def save(self, name: str, step: int, model, optimizer: torch.optim.Optimizer) -> None:
        path = self._folder / name / "checkpoint.pt"
        partial = path.with_suffix(".partial")
        torch.save({"step": step, "adapter": weights(model), "optimizer": optimizer.state_dict()}, partial)
        partial.replace(path)

    def finish(self, name: str, model) -> None:
        """Write the adapter in bfloat16, in PEFT's format, with the settings of MoBA and of the context."""
        path = self.adapter(name)
        partial = path.with_suffix(".partial")
        partial.mkdir(exist_ok=True)
        half = {name: x.to(torch.bfloat16).contiguous() for name, x in weights(model).items()}
        save_file(half, partial / "adapter_model.safetensors", metadata={"format": "pt"})
        config = copy.copy(model.peft_config["default"])
        config.base_model_name_or_path, config.inference_mode = self._base, True
        config.save_pretrained(partial)
        if name != "full":
            (partial / "moba.json").write_text(json.dumps(dict(moba_config(name, self._args))))
        if self._args.rope_theta is not None:
            context = {"rope_theta": self._args.rope_theta, "max_position_embeddings": context_of(model)}
            (partial / "context.json").write_text(json.dumps(context))
        partial.rename(path)
        (path.parent / "checkpoint.pt").unlink(missing_ok=True)

    def log(self, name: str, step: int, entry: dict[str, float]) -> None:
        with (self._folder / name / "log.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **entry}) + "\n")

    def _keep_log(self, name: str, last: int) -> None:
        """Remove log entries after the checkpoint: these steps are done again."""
        path = self._folder / name / "log.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        path.write_text("".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= last))
