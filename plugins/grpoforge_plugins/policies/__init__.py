"""Loading policies."""
