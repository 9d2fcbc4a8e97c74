"""Constants that the api, the kernels and the reference of `select` share."""

# Ideal shares are snapped to multiples of 2**-QUANTUM_BITS before floor and remainder are taken, so that shares which
# are equal (or whole) in exact arithmetic stay equal (or whole) in spite of float64 rounding.
QUANTUM_BITS = 30
TOTAL_LIMIT = 2**30  # snapped shares are int64
LAYER_LIMIT = 1024  # the budget kernel holds all layers in one block
