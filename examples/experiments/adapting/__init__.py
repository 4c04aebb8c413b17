"""What `adapt.py` is made of: the runs, the text and the files."""
