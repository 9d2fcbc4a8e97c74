"""What the operations share: input checks, dispatch, LSE bases. Nothing here imports Triton except `tiles`."""
