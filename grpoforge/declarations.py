"""What a component says about itself beside its signature: facts the program may rely on, checked by the test kit.

A class states a fact as a class attribute, a function through `declares`. Known facts:

    ``coupling``         loss: what a token's loss may depend on (`grpoforge.types.Coupling`); ``sequence`` by default
    ``level``            loss, correction: ``token`` or ``sequence``, what one ratio or weight belongs to
    ``min_group``        advantage: fewest completions per prompt it can work with; 2 by default
    ``scales_by_std``    advantage: divides by the spread of the group, so that two completions keep no size of gap
    ``invariances``      advantage: those of ``shift``, ``scale``, ``group_sum`` that hold; see `grpoforge.testing`
    ``on_policy_gradient``  loss: whether its gradient at ratio 1 is ``-A`` times that of the log-prob; true by default
    ``unbiased``         KL estimator: its mean over the policy is the KL
    ``right_in_reward``  KL estimator: as a reward its policy gradient is that of the KL
    ``learns_from_others``  reward: whether the other rewards of the run are what it learns from
    ``kernel_form``      loss, KL estimator: what it is called among the fused kernels
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


def declared(component: object, name: str, default: Any = None) -> Any:
    """What ``component``, a function (also with options bound) or an object, states as ``name``."""
    return getattr(getattr(component, "func", component), name, default)
