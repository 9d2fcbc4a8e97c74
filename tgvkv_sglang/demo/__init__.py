"""Scenes, questions and probes of the bundled demo model (numpy, PIL and the standard library only)."""
