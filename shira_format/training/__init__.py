"""Training of sparse adapters: entries as parameters, or masked gradients for any trainer.

torch is imported with the modules of this room, which the package's door does when one of its names is asked for.
"""

from __future__ import annotations
