"""Tiny models of every family that is served, and what is checked of each (docs/support.md)."""
