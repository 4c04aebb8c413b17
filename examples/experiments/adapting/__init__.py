"""The parts of `adapt.py`: the runs, the text and the files."""
