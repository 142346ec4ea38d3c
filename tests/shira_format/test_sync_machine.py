"""Publishers and subscribers under whatever happens: whoever says that it is at a version holds its bits."""

from __future__ import annotations

import fsspec
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from upath import UPath

from shira_format.errors import BaseMismatch, SourceError
from shira_format.storage.places import open_place
from shira_format.sync import Publisher, Subscriber
from shira_format.sync.index import Index
from tests.sync import Crash, Fragile, bits, like, some_weights

HOW = st.sampled_from(["before", "after", "torn"])
AT = st.integers(0, 8)
SEEDS = st.integers(0, 2**16)


class Machine(RuleBasedStateMachine):
    """A trainer with a publisher, publishers that were thought dead, and servers."""

    @initialize(every=st.sampled_from([None, 1, 3]))
    def start(self, every: int | None) -> None:
        fsspec.filesystem("memory").store.clear()
        self.every = every
        self.weights = some_weights()
        self.place = Fragile(open_place(UPath("memory://run")))
        self.published: dict[int, dict[str, bytes]] = {}
        self.dead: list[Publisher] = []
        self.servers: list[tuple[Subscriber, dict[str, np.ndarray]]] = []
        self.publisher: Publisher | None = None
        self.alive()

    def alive(self) -> Publisher:
        """The publisher; a new one if it died."""
        if self.publisher is None:
            before = bits(self.weights)
            self.publisher = Publisher(self.weights, self.place, snapshot_every=self.every)
            self.published.setdefault(0, before)
            assert max(self.published) == self.publisher.version
        return self.publisher

    def lines(self) -> Index:
        index = Index(self.place.place)
        index.refresh()
        return index

    @rule(seed=SEEDS, share=st.sampled_from([0.0, 0.02, 1.0]))
    def train(self, seed: int, share: float) -> None:
        random = np.random.default_rng(seed)
        for array in self.weights.values():
            raw = array.reshape(-1).view(np.uint8)
            which = random.random(raw.size) < share
            raw[which] = (
                random.integers(0, 2, which.sum()) if array.dtype == bool else random.integers(0, 256, which.sum())
            )

    @rule()
    def publish(self) -> None:
        publisher = self.alive()
        done = publisher.publish()
        assert max(self.published) + 1 == done.version == publisher.version
        self.published[done.version] = bits(self.weights)

    @rule(at=AT, how=HOW, dies=st.booleans())
    def publish_and_crash(self, at: int, how: str, dies: bool) -> None:
        publisher, version = self.alive(), max(self.published) + 1
        try:
            with self.place.failing(at, how):
                publisher.publish()
        except Crash:
            pass
        if version in {number for number, _ in self.lines().lines}:
            self.published[version] = bits(self.weights)
        if dies:
            self.publisher = None
        elif self.lines().torn:  # its own, which it cannot tell from another's
            with pytest.raises(SourceError, match="another publisher"):
                publisher.publish()
            self.publisher = None

    @rule()
    def restart(self) -> None:
        self.dead.append(self.alive())
        self.publisher = None
        self.alive()

    @rule(at=AT, how=HOW)
    def crash_while_starting(self, at: int, how: str) -> None:
        self.publisher = None
        try:
            with self.place.failing(at, how):
                Publisher(self.weights, self.place, snapshot_every=self.every)
        except Crash:
            pass

    @precondition(lambda self: self.dead)
    @rule(of=st.data())
    def one_that_was_thought_dead(self, of: st.DataObject) -> None:
        dead = of.draw(st.sampled_from(self.dead))
        before = self.lines().lines
        later = {line.publisher for line in before.values() if line.version > dead.version}
        if later <= {dead._token}:  # nobody else published since: it goes on, and the other one is refused
            self.published[dead.publish().version] = bits(self.weights)
            if self.publisher is not None:
                self.dead.append(self.publisher)
            self.dead.remove(dead)
            self.publisher = dead
        else:
            with pytest.raises(SourceError, match="another publisher wrote"):
                dead.publish()
            assert before == self.lines().lines

    @rule(seed=SEEDS, history=st.integers(0, 2), verify=st.sampled_from(["entries", "all"]))
    def start_server(self, seed: int, history: int, verify: str) -> None:
        model = some_weights(seed % 2) if seed % 3 else like(self.weights)
        self.servers = self.servers[-2:]
        self.servers.append((Subscriber(model, self.place, history=history, verify=verify), model))

    @precondition(lambda self: self.servers)
    @rule(of=st.data())
    def update(self, of: st.DataObject) -> None:
        server, model = of.draw(st.sampled_from(self.servers))
        server.update()
        assert max(self.published) == server.version
        assert self.published[server.version] == bits(model)

    @precondition(lambda self: self.servers)
    @rule(of=st.data())
    def update_to(self, of: st.DataObject) -> None:
        server, model = of.draw(st.sampled_from(self.servers))
        version = of.draw(st.sampled_from(sorted(self.published)))
        before = bits(model)
        try:
            server.update(version)
            assert version == server.version
        except SourceError as error:
            assert "nothing leads" in str(error) or "has no version" in str(error)
            assert version not in {number for number, _ in self.lines().lines}
            assert before == bits(model)

    @precondition(lambda self: self.servers)
    @rule(of=st.data(), at=AT)
    def update_and_crash(self, of: st.DataObject, at: int) -> None:
        server, model = of.draw(st.sampled_from(self.servers))
        before = bits(model)
        try:
            with self.place.failing(at):
                server.update()
        except Crash:
            assert before == bits(model)

    @precondition(lambda self: self.servers)
    @rule(of=st.data())
    def back(self, of: st.DataObject) -> None:
        server, model = of.draw(st.sampled_from(self.servers))
        version, before = server.version, bits(model)
        try:
            assert server.back().before == version
        except BaseMismatch:
            assert before == bits(model)

    @precondition(lambda self: self.servers)
    @rule(of=st.data())
    def damage(self, of: st.DataObject) -> None:
        """A byte of a file that is read is another one, or the file ends early."""
        server, model = of.draw(st.sampled_from(self.servers))
        store = fsspec.filesystem("memory").store
        name = of.draw(st.sampled_from(sorted(name for name in store if name.endswith((".st", ".safetensors")))))
        kept, before = store[name].getvalue(), bits(model)
        cut = of.draw(st.booleans())
        at = of.draw(st.integers(0, len(kept) - 1))
        fsspec.filesystem("memory").pipe_file(
            name, kept[:at] if cut else kept[:at] + bytes([kept[at] ^ 1]) + kept[at + 1 :]
        )
        try:
            server.update()
        except SourceError as error:
            assert name.rpartition("/")[2] in str(error)
            assert before == bits(model)
        fsspec.filesystem("memory").pipe_file(name, kept)

    @rule(of=st.data())
    def compose(self, of: st.DataObject) -> None:
        publisher = self.alive()
        listed = {number for number, _ in self.lines().lines}
        base = of.draw(st.sampled_from(sorted(listed)))
        try:
            publisher.compose(base)
        except SourceError as error:
            there = (publisher.version, base) in self.lines().lines
            assert there or "no steps" in str(error)

    @rule(of=st.data())
    def prune(self, of: st.DataObject) -> None:
        publisher = self.alive()
        publisher.prune(
            of.draw(
                st.sampled_from(sorted(version for version, _ in self.lines().lines)) | st.just(publisher.version)
            )
        )
        store = fsspec.filesystem("memory").store
        named = {one.file for line in self.lines().lines.values() for one in (line.patch, line.snapshot) if one}
        assert named <= {name.removeprefix("/run/") for name in store}

    @invariant()
    def versions_are_what_was_published(self) -> None:
        for server, model in getattr(self, "servers", ()):
            if server.version is not None:
                assert self.published[server.version] == bits(model)


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=20, stateful_step_count=30)
