"""The rewards that come with grpoforge, one concept per file.

* `answers`: reads the final answer of a completion as an exact number; what the rewards below agree on.
* `math`: the final answer equals the reference.
* `brevity`: fewer tokens are better, among completions that answer.
* `format`: the completion ends as it was asked to.

Completions are hostile: they are scanned, in time linear in their length, and never evaluated.
"""
