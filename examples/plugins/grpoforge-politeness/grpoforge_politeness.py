from grpoforge import hookimpl


def politeness(completions, *, word: str = "please"):
    """1.0 when the completion says `word`, else 0.0."""
    return [float(word in text.lower()) for text in completions]


@hookimpl
def register_rewards(register):
    register("politeness", politeness)
