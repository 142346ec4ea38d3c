"""Steps of training, shipped: a publisher writes what each step changed to a place, and subscribers follow on live models.

A place is a folder, or one behind fsspec:

* ``structure.json``: names, dtypes and shapes of the tensors, and which are tied; written once.
* ``index/VERSION.json``: one line of JSON for each version, written last and only once: see :class:`shira_format.sync.index.Line`.
* ``patches/VERSION-PUBLISHER.st``: what a version changes of the one before, as an adapter file.
* ``snapshots/VERSION-PUBLISHER.safetensors``: all tensors of some versions.
* ``index/VERSION-from-BASE.json`` and ``patches/VERSION-from-BASE-PUBLISHER.st``: several steps in one.
"""

from __future__ import annotations

from shira_format.sync.publisher import Published, Publisher
from shira_format.sync.restore import restore
from shira_format.sync.subscriber import Subscriber, Update

__all__ = ["Published", "Publisher", "Subscriber", "Update", "restore"]
