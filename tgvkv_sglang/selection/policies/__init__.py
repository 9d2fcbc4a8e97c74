"""Scoring policies beside the paper's, one file each: ours, and the field's to compare with (docs/policies.md)."""
