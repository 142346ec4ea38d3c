"""The rules by name."""

from __future__ import annotations

from shira_format.masks.base import Rule
from shira_format.masks.gallop import Gallop
from shira_format.masks.grad import Grad
from shira_format.masks.lift import Lift
from shira_format.masks.neuroada import NeuroAda
from shira_format.masks.rand import Rand
from shira_format.masks.snip import Snip
from shira_format.masks.struct import Struct
from shira_format.masks.talos import Talos
from shira_format.masks.wm import WM

# Those that need nothing but a name; Given and GradUpdate need tensors of the caller.
RULES: dict[str, type[Rule]] = {
    rule.name: rule for rule in (Struct, Rand, WM, Grad, Snip, Lift, Gallop, Talos, NeuroAda)
}


def rule_of(rule: str | Rule, seed: int = 0) -> Rule:
    """A rule by its name, with its default settings and the seed if it has one; a rule is itself.

    Raises:
        ValueError: no rule has the name, or a seed is given for a rule that has none.
    """
    if isinstance(rule, Rule):
        if seed:
            raise ValueError(f"a seed of {seed} beside a rule that is made already: give it to the rule")
        return rule
    if rule not in RULES:
        raise ValueError(f"no rule is named {rule!r}; the rules are {', '.join(RULES)}")
    if rule == Rand.name:
        return Rand(seed)
    if seed:
        raise ValueError(f"the rule {rule!r} draws nothing: a seed has no meaning with it")
    return RULES[rule]()
