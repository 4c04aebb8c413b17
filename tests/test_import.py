"""`import moba_flex` loads little beside transformers' model classes: what is not needed for a call is loaded when it is used."""

from __future__ import annotations

import json

from support.fresh import FreshPython

# Packages for training, pictures, files of weights and kernels. transformers itself may load some of them.
HEAVY = {"datasets", "flash_attn", "gguf", "matplotlib", "pandas", "peft", "scipy", "sklearn", "triton", "trl"}
MOST = 40  # modules of others; none with transformers 5.24


PROGRAM = "import json, sys; before = set(sys.modules); import moba_flex; print(json.dumps(sorted(set(sys.modules) - before)))"


def test_the_package_adds_few_modules_to_those_of_transformers_model_classes(fresh: FreshPython) -> None:
    done = fresh.run(PROGRAM)
    assert done.returncode == 0, done.stderr
    added = set(json.loads(done.stdout.splitlines()[-1]))
    of_others = sorted(name for name in added if name.split(".")[0] != "moba_flex")
    assert not HEAVY & {name.split(".")[0] for name in of_others}, of_others
    assert not [name for name in of_others if name.startswith(("torch._inductor", "torch._dynamo", "transformers.trainer"))], of_others
    assert len(of_others) <= MOST, of_others
    assert "moba_flex.distributed" not in added and "moba_flex.models.schedule" not in added and "moba_flex.attention" in added
