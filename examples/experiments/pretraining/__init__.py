"""The parts of `pretrain.py`: the text, the runs and the comparison."""
