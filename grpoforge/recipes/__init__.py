"""The recipes that come with the package: one YAML file each, opening with its paper and its differences from it."""
