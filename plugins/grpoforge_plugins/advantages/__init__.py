"""Advantage normalizers: ``(rewards [P, G, K], weights [K]) -> advantages [P, G]``, unscored rows 0."""
