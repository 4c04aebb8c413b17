"""What `pretrain.py` is made of: the text, the runs and the comparison."""
