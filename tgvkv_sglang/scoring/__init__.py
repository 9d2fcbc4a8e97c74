"""Which vision units to keep: pure functions of masses and scores. Higher score = keep."""
