"""The rewards that come with grpoforge, one concept per file.

* `answers`: reads the final answer of a completion as an exact number; what the rewards below agree on.
* `math`: the final answer equals the reference; `symbolic` asks math-verify, in the process of `symbolic_worker`.
* `reasoning`: the arithmetic, read by `equations`, leads to the answer.
* `brevity`, `length`, `overlong`: how many tokens.
* `format`: the completion ends as it was asked to.
* `repetition`, `language`: how it is written.
* `reward_model`: what a sequence classifier thinks of it.

Completions are hostile: they are scanned, in time linear in their length, and never evaluated.
"""
