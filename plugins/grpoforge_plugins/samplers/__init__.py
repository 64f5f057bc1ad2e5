"""Samplers: prompts to completions with the log-probs they were sampled at."""
