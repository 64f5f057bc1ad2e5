"""What a person sees of a run: the screen, the metrics file, the rollouts files, TensorBoard."""
