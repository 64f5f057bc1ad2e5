"""Each operation in plain PyTorch: the definition, the oracle of the tests, and the path that runs everywhere."""
