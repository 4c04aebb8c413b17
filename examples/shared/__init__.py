"""What several examples use: how a script begins and ends, its flags, models, text, and files of results."""
