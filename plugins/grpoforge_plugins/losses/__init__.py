"""Per-token policy losses. A loss normalizes nothing: the engine weighs, masks and sums."""
