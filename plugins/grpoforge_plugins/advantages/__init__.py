"""Advantages: rewards ``[P, G, K]`` and their weights to one number per completion, ``[P, G]``, unscored rows 0."""
