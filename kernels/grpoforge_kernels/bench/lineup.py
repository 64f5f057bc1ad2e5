"""All contenders of a case: ours first, in the order in which they are compared."""

from __future__ import annotations

from grpoforge_kernels.bench import ours, peers
from grpoforge_kernels.bench.contenders import Contender
from grpoforge_kernels.bench.plan import Case, Plan


def contenders(case: Case, plan: Plan) -> list[Contender]:
    """Ours for each backend of ``plan`` (each one that can run here when it names none), then the peers."""
    return [*ours.contenders(case, plan.backends), *peers.peers(case)]


def left_out(contender: Contender, plan: Plan) -> str:
    """Why a contender that could run does not, at the effort of ``plan``; empty when it does."""
    if not contender.compiled or plan.effort == "full":
        return ""
    if plan.effort == "quick":
        return "compiles first: left out by --quick"
    # One form of torch.compile tells; the other one, and what compiles itself, are for the long run.
    return "measured by --full" if contender.name == "torch.compile, log_softmax" else ""
