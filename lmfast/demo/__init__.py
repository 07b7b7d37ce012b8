"""The main job in one command: both models, ours and as a textbook writes them, on real text."""
