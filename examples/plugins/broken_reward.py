"""A reward with every mistake that is easy to make. `grpoforge plugins check broken_reward.py` names them all:

- `order`: the first completion of the batch gets a bonus.
- `alone`: so a completion earns more in a batch of its own.
- `empty_completion`: an empty completion has no last word.
- `hostile_text`: Python refuses to read an integer of 5,000 digits.
- `abstains`: a reference that cannot be read makes every completion wrong, where it should say "not scored".
- `travels`: a function inside a function cannot be sent to another process.
"""

from grpoforge import hookimpl


def make_reward(bonus):
    def last_number(completions, answer):
        """1.0 when the last word is the number at the end of `answer`."""
        rewards = []
        for row, (text, reference) in enumerate(zip(completions, answer, strict=True)):
            last = text.split()[-1].rstrip(".")
            said = int(last) if last.isdecimal() else None
            words = reference.split()
            right = int(words[-1]) if words and words[-1].isdecimal() else None
            correct = float(said is not None and said == right)
            rewards.append(correct + (bonus if row == 0 and correct else 0.0))
        return rewards

    return last_number


@hookimpl
def register_rewards(register):
    register("last-number", make_reward(bonus=0.1))
