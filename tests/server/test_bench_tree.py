"""The benchmark of the prefix cache's own work, on a handful of conversations."""

from bench.tree import measure

BOTH = {"match", "lock", "evictable", "insert", "unlock", "evict, one leaf"}
OURS = {"use", "disuse", "idle check", "idle check, slot by slot"}
IMAGES = {"evict, one image", "trim, one image"}


def test_every_operation_is_timed_beside_stock_where_stock_has_it():
    rows = measure([8, 60], running=3, admissions=2, seed=0)
    for pictures in ("own", "one"):
        for size in (8, 60):
            found = {row.operation: row for row in rows if (row.pictures, row.conversations) == (pictures, size)}
            assert found.keys() - IMAGES == BOTH | OURS
            assert found.keys() >= IMAGES or pictures == "one"  # which has too many views, or is packed at once
            assert {name for name, row in found.items() if row.stock_us is not None} == BOTH
            assert found["match"].calls == 2 and found["evictable"].calls == 3 * 2
    assert len({(row.pictures, row.conversations, row.operation) for row in rows}) == len(rows)
