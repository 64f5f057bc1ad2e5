"""``python -m grpoforge`` and ``torchrun -m grpoforge``."""

from grpoforge.cli.main import main

main()
