"""The preference model: a small encoder with one score per completion, taught by pairs (Bradley-Terry).

* `pairs`: what a pair is; pairs files; pairs from the rollouts of a step.
* `encoder`: prompt and completion to one score, on any Hugging Face encoder.
* `vocabulary`: a tokenizer for a new one.
* `loss`: the Bradley-Terry loss and the probability that it fits.
* `learning`: one optimizer, one update; `offline` trains and measures on files, `reward` during a run.
* `figures`: accuracy, calibration, length bias.
* `corruptions`: pairs of right and spoiled solutions, from worked problems.
"""
