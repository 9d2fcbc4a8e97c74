"""Stand-ins for what only a GPU has: FlashInfer in plain torch, and a plugin that gives it to a CPU server."""
