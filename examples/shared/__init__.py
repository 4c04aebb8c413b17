"""Code that several examples share: start and end of a script, flags, models, text, and result files."""
