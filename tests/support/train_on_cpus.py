"""`accelerate launch ... train_on_cpus.py` is examples/train.py where accelerate takes CPUs for GPUs."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import torch
import train
from support.cpus_as_gpus import let_cpus_pass_as_gpus

let_cpus_pass_as_gpus()
torch.accelerator.is_available = lambda: True
torch.optim.Optimizer._accelerator_graph_capture_health_check = lambda self: None  # a CUDA build of PyTorch 2.14 would ask the GPU
train.main([x for x in sys.argv[1:] if x != "--cpu"])
