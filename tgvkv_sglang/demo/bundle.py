"""Where the model is that ships with the package."""

from pathlib import Path

DEMO_MODEL = Path(__file__).resolve().parent.parent / "data" / "demo_model"
"""A Hugging Face checkpoint directory."""
