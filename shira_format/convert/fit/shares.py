"""How many of a budget of entries each weight gets."""

from __future__ import annotations

from shira_format.convert.fit.task import Task


def shares_of(task: Task, budget: int) -> dict[str, int]:
    """The same density for all weights; what is left over by rounding down goes to those that lost most by it."""
    exact = {name: budget * task.parameter(name).numel() / task.numel for name in task.source}
    found = {name: int(share) for name, share in exact.items()}
    order = sorted(exact, key=lambda name: found[name] - exact[name])
    for name in order[: budget - sum(found.values())]:
        found[name] += 1
    return found
