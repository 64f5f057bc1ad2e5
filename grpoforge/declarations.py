"""What a component says about itself beside its signature: facts the program may rely on, checked by the test kit.

A class states a fact as a class attribute, a function through `declares`. Known facts:

    ``coupling``         loss: what a token's loss may depend on (`grpoforge.types.Coupling`); ``sequence`` by default
    ``level``            loss, correction: ``token`` or ``sequence``, what one ratio or weight belongs to
    ``min_group``        advantage: fewest completions per prompt it can work with; 2 by default
    ``block``            sampler, advantage: rows of a group that belong together, as the 2 of a pair; 1 by default
    ``target_temperature``  correction: temperature of the ``target_logprobs`` it reads; 1 by default
    ``scales_by_std``    advantage: divides by the spread of the group, so that two completions keep no size of gap
    ``invariances``      advantage: those of ``shift``, ``scale``, ``group_sum`` that hold; see `grpoforge.testing`
    ``on_policy_gradient``  loss: whether its gradient at ratio 1 is ``-A`` times that of the log-prob; true by default
    ``splits``           dataset: what it can be asked for, ``("train", "test")`` by default; one with ``validation`` is
                         asked for that while training, and for ``test`` by ``grpoforge eval`` only
    ``unbiased``         KL estimator: its mean over the policy is the KL
    ``right_in_reward``  KL estimator: as a reward its policy gradient is that of the KL
    ``answer_of``        reward: the final answer that a completion states; see below
    ``learns_from_others``  reward: whether the other rewards of the run are what it learns from
    ``kernel_form``      loss, KL estimator: what it is called among the fused kernels; of a class only beside its
                         ``__call__``, and never of a wrapper: who computes something else has to say so again

``answer_of(text: str) -> str | None`` is the final answer of a completion in one written form, None when none can be
read. A measurement tells by it a wrong answer from an unreadable one, and counts votes: two completions of one problem
answer the same when their strings are equal. What counts as an answer may depend on options, so ask the component that
was built: ``declared(reward.function, "answer_of")``. It is pure and never raises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Component = TypeVar("Component", bound=Callable[..., Any])


def declares(**facts: Any) -> Callable[[Component], Component]:
    """A decorator that states ``facts`` about a function."""

    def state(component: Component) -> Component:
        for name, value in facts.items():
            setattr(component, name, value)
        return component

    return state


def unbound(component: object) -> Any:
    """``component``, a function or an object, without the options that are bound to it."""
    return getattr(component, "func", component)


def declared(component: object, name: str, default: Any = None) -> Any:
    """What ``component``, a function (also with options bound) or an object, states as ``name``."""
    return getattr(unbound(component), name, default)
