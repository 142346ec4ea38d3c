"""Adapters of checkpoints on the ranks of serving engines: against modules that load and fuse weights as the engines do."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import shira_format as shira
from shira_format.adapter import Adapter
from shira_format.entries.placed import load_placed
from shira_format.errors import BaseMismatch, BaseRequired, FormatError, SourceError
from shira_format.format import save
from shira_format.format.codecs import gaps
from shira_format.live import AdapterPool, Switcher, apply, place_adapter
from shira_format.names.placement import Block, Placement
from shira_format.names.servers import VISION_LANGUAGE, ServerLayer, ServerLayout
from shira_format.tensors import DenseTensor, SparseTensor
from tests import models
from tests.engines import Rank, Server, Sizes, checkpoint, forward

DENSE, EXPERTS = Sizes(), Sizes(experts=4)
RANKS = {
    "one": (DENSE, 1, 1),
    "a KV head for each rank": (DENSE, 2, 1),
    "fewer KV heads than ranks": (DENSE, 4, 1),
    "one KV head": (replace(DENSE, kv_heads=1), 2, 1),
    "experts": (EXPERTS, 1, 1),
    "sliced experts": (EXPERTS, 2, 1),
    "experts by rank": (EXPERTS, 2, 2),
    "an expert for each rank": (EXPERTS, 4, 4),
}
TOKENS = torch.tensor([[1, 69, 3, 64, 33, 0]])
Weights = dict[str, torch.Tensor]


def ranks_of(case: str) -> tuple[Sizes, list[tuple[Rank, ServerLayout]]]:
    sizes, tp, ep = RANKS[case]
    found = []
    for rank in range(tp):
        ep_rank = rank if ep > 1 else 0
        layout = ServerLayout(
            sizes.heads,
            sizes.kv_heads,
            sizes.head,
            tp,
            rank,
            num_experts=sizes.experts,
            ep_size=ep,
            ep_rank=ep_rank,
        )
        found.append((Rank(tp, rank, ep, ep_rank), layout))
    return sizes, found


def random_adapter(base: Weights, seed: int, *, self_contained: bool = True, dense: bool = True) -> Adapter:
    """Random targets in every matrix and in a half of the vectors; the other half is replaced."""
    rng = np.random.default_rng(seed)
    tensors, wholes = [], []
    for number, (name, weight) in enumerate(base.items()):
        flat = weight.reshape(-1).numpy()
        if weight.ndim == 1 and number % 2 and dense:
            new = rng.standard_normal(weight.shape).astype(np.float32)
            known = DenseTensor(name, new, base=weight.numpy())
            wholes.append(known if self_contained else DenseTensor(name, new, base_digest=known.base_digest))
            continue
        at = np.flatnonzero(rng.random(flat.size) < 0.2)
        tensors.append(changed(name, weight, at, rng.standard_normal(at.size), self_contained=self_contained))
    return Adapter(tensors, dense=wholes)


def changed(name: str, weight: torch.Tensor, at: Any, values: Any, *, self_contained: bool = True) -> SparseTensor:
    at, values = np.asarray(at), np.asarray(values, np.float32)
    known = SparseTensor(name, tuple(weight.shape), at, values, base=weight.reshape(-1).numpy()[at])
    if self_contained:
        return known
    return SparseTensor(name, known.shape, at, values, base_digest=known.base_digest)


def patched(base: Weights, adapters: list[tuple[Adapter, float]]) -> Weights:
    """The checkpoint with adapters, on its own tensors."""
    weights = {name: weight.clone() for name, weight in base.items()}
    Switcher(weights).set(adapters)
    return weights


def state(model: torch.nn.Module) -> Weights:
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def assert_same(found: torch.nn.Module, expected: torch.nn.Module | Weights) -> None:
    theirs = expected if isinstance(expected, dict) else expected.state_dict()
    ours = found.state_dict()
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert torch.equal(weight.view(torch.int32), theirs[name].view(torch.int32)), name


def test_the_ranks_compute_what_the_whole_model_does() -> None:
    """The modules themselves, without adapters."""
    for case in RANKS:
        sizes, ranks = ranks_of(case)
        base = checkpoint(sizes)
        whole = forward([Server(sizes, Rank()).load(base)], TOKENS)
        torch.testing.assert_close(forward([Server(sizes, rank).load(base) for rank, _ in ranks], TOKENS), whole)


@pytest.mark.parametrize("alpha", [1.0, 0.5])
@pytest.mark.parametrize("case", RANKS)
def test_each_rank_equals_one_that_loaded_the_patched_checkpoint(case: str, alpha: float) -> None:
    sizes, ranks = ranks_of(case)
    base = checkpoint(sizes)
    adapter = random_adapter(base, 1)
    tuned = patched(base, [(adapter, alpha)])
    servers = []
    for rank, layout in ranks:
        server = Server(sizes, rank).load(base)
        before = state(server)
        switcher = Switcher(server, layout=layout)
        switcher.load(adapter, alpha)
        assert_same(server, Server(sizes, rank).load(tuned))
        switcher.revert()
        assert_same(server, before)
        switcher.switch(adapter, alpha)
        servers.append(server)
    whole = forward([Server(sizes, Rank()).load(tuned)], TOKENS)
    torch.testing.assert_close(forward(servers, TOKENS), whole)
    assert not torch.allclose(whole, forward([Server(sizes, Rank()).load(base)], TOKENS))


@pytest.mark.parametrize("case", RANKS)
def test_several_adapters(case: str) -> None:
    sizes, ranks = ranks_of(case)
    base = checkpoint(sizes)
    one, two = random_adapter(base, 1), random_adapter(base, 2, dense=False)
    for rank, layout in ranks:
        server = Server(sizes, rank).load(base)
        before = state(server)
        switcher = Switcher(server, layout=layout)
        sparse = Adapter(dict(one))
        switcher.load(sparse, 0.7)
        report = switcher.load(two, -2)
        assert report.overlapping
        assert_same(server, Server(sizes, rank).load(patched(base, [(sparse, 0.7), (two, -2.0)])))
        switcher.unload(sparse)
        assert_same(server, Server(sizes, rank).load(patched(base, [(two, -2.0)])))
        with switcher.applied(sparse):
            pass
        switcher.revert()
        assert_same(server, before)


@pytest.mark.parametrize("case", RANKS)
def test_files_and_pools(case: str, tmp_path: Path) -> None:
    """Adapters without the base's values: compared in the model where a rank has all, else by the base checkpoint."""
    sizes, ranks = ranks_of(case)
    base = checkpoint(sizes)
    folder = models.save_arrays(
        tmp_path / "base" / "model.safetensors", {n: w.numpy() for n, w in base.items()}
    ).parent
    (tmp_path / "adapters").mkdir()
    adapters = {str(seed): random_adapter(base, seed, self_contained=False) for seed in (1, 2)}
    for name, adapter in adapters.items():
        save(adapter, tmp_path / "adapters" / f"{name}.st")
    for rank, layout in ranks:
        server = Server(sizes, rank).load(base)
        before = state(server)
        if rank.size > 1:
            with pytest.raises(
                BaseRequired, match=r"adapters.1\.st: tensor 'model.* a part of it is here.*pass base="
            ):
                Switcher(server, layout=layout).load(tmp_path / "adapters" / "1.st")
        else:
            Switcher(server, layout=layout).load(tmp_path / "adapters" / "1.st")
            assert_same(server, Server(sizes, rank).load(patched(base, [(adapters["1"], 1.0)])))
            server.load(base)
        pool = AdapterPool(tmp_path / "adapters", layout=layout, base=folder)
        for switcher in (
            Switcher(server, layout=layout, base=folder), Switcher(server, pool=pool),
            Switcher(server, layout=layout, base=folder, pool=AdapterPool(tmp_path / "adapters")),
        ):  # fmt: skip
            for name in ("1", "2", "1", "2"):
                source = name if switcher._pool is not None else tmp_path / "adapters" / f"{name}.st"
                switcher.switch(source)
                assert_same(server, Server(sizes, rank).load(patched(base, [(adapters[name], 1.0)])))
            switcher.revert()
            assert_same(server, before)
        assert pool.statistics.misses == 2


# Refused, with nothing written


def refused(server: Server, layout: ServerLayout, adapter: Any, reason: str, **options: Any) -> None:
    before = state(server)
    with pytest.raises((BaseMismatch, BaseRequired), match=reason):
        Switcher(server, layout=layout, **options).load(adapter)
    assert_same(server, before)


def test_another_base_is_refused(tmp_path: Path) -> None:
    for case in ("one", "experts", "a KV head for each rank"):
        sizes, ranks = ranks_of(case)
        base = checkpoint(sizes)
        rank, layout = ranks[0]
        for self_contained in (True, False):
            adapter = random_adapter(base, 1, self_contained=self_contained)
            for name in ("model.layers.1.self_attn.v_proj.weight", "model.embed_tokens.weight"):
                at = int(adapter[name].indices[0])
                other = {key: weight.clone() for key, weight in base.items()}
                other[name].view(-1)[at] += 1
                if rank.size > 1 and not self_contained:
                    continue
                refused(Server(sizes, rank).load(other), layout, adapter, "the base holds other values")
    sizes, ranks = ranks_of("a KV head for each rank")
    other = checkpoint(sizes, 7)
    folder = models.save_arrays(tmp_path / "model.safetensors", {n: w.numpy() for n, w in other.items()}).parent
    adapter = random_adapter(checkpoint(sizes), 1, self_contained=False)
    refused(
        Server(sizes, ranks[0][0]).load(other), ranks[0][1], adapter, "base .* holds other values", base=folder
    )


def test_a_replaced_part_is_compared_with_the_base() -> None:
    sizes, ranks = ranks_of("one")
    base = checkpoint(sizes)
    name = "model.layers.0.self_attn.k_proj.bias"
    for known in (True, False):
        whole = DenseTensor(name, base[name].numpy() + 1, base=base[name].numpy())
        whole = whole if known else DenseTensor(name, whole.values, base_digest=whole.base_digest)
        other = base | {name: base[name] + 2}
        refused(
            Server(sizes, Rank()).load(other), ranks[0][1], Adapter(dense=[whole]), "the base holds other values"
        )


def test_what_no_rank_has() -> None:
    sizes, ranks = ranks_of("experts by rank")
    base = checkpoint(sizes)
    layouts = [layout for _, layout in ranks]
    server = Server(sizes, ranks[0][0]).load(base)

    def one(name: str, *shape: int) -> Adapter:
        return Adapter([changed(name, torch.zeros(shape), [0], [1])])

    expert = "model.layers.0.mlp.experts.3.up_proj.weight"
    report = Switcher(server, layout=layouts[0]).load(one(expert, sizes.inner, sizes.hidden))
    assert report.entries == 0  # it is another rank's
    beyond = expert.replace("layers.0", "layers.7")
    refused(server, layouts[0], one(beyond, sizes.inner, sizes.hidden), "the model has no .*layers.7.*w13_weight")
    refused(
        server,
        layouts[0],
        one(expert, 2 * sizes.inner, sizes.hidden),
        r"is for shape \[2, 96, 16\], the weight has \[2, 48, 16\]",
    )
    refused(
        server,
        layouts[0],
        one(expert.replace("3.up", "4.up"), sizes.inner, 16),
        "not a matrix of one of 4 experts",
    )
    refused(
        server,
        layouts[0],
        one(expert.replace("3.up_proj", "3.mid"), sizes.inner, 16),
        "does not know the part 'mid'",
    )
    refused(
        server,
        layouts[0],
        one("model.layers.0.mixer.in_proj.weight", 4, 4),
        "does not know how 'in_proj' is shared by 2",
    )
    refused(server, layouts[0], one("transformer.h.0.attn.c_attn.weight", 4, 4), "layers=")
    refused(server, layouts[0], one("model.layers.0.self_attn.q_proj.weight", 12, 16), "has 12 rows; 4 heads")
    refused(
        server, layouts[0], one("model.layers.0.self_attn.o_proj.weight", 16, 15), "has 15 columns, which 2 ranks"
    )
    single = Switcher(Server(DENSE, Rank()), layout=ServerLayout(4, 2, 4))
    with pytest.raises(BaseMismatch, match=r"the model has no 'transformer\.h\.0\.attn\.c_attn\.weight'"):
        single.load(one("transformer.h.0.attn.c_attn.weight", 4, 4))


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"tp_size": 3}, "4 heads cannot be shared by tp_size 3"),
        ({"tp_size": 2, "tp_rank": 2}, "tp_rank 2 is not one of 2 ranks"),
        ({"num_heads": 12, "num_kv_heads": 4, "tp_size": 6}, "4 KV heads cannot be shared by tp_size 6"),
        ({"num_experts": 5, "ep_size": 2}, "5 experts cannot be shared by ep_size 2"),
    ],
)
def test_sizes_that_ranks_cannot_share(sizes: dict[str, int], reason: str) -> None:
    with pytest.raises(SourceError, match=reason):
        ServerLayout(**({"num_heads": 4, "num_kv_heads": 2, "head_size": 4} | sizes))


def test_arguments_that_exclude_each_other() -> None:
    with pytest.raises(TypeError, match="names of its own"):
        Switcher({}, layout=ServerLayout(1, 1, 1), prefix="x")
    with pytest.raises(TypeError, match="base is for a layout"):
        Switcher({}, base="x")


def test_a_part_that_is_replaced_and_changed() -> None:
    sizes, ranks = ranks_of("a KV head for each rank")
    base = checkpoint(sizes)
    rank, layout = ranks[1]
    name, other = "model.layers.0.self_attn.q_proj.bias", "model.layers.0.self_attn.k_proj.bias"
    whole = Adapter(dense=[DenseTensor(name, base[name].numpy() + 1, base=base[name].numpy())])
    again = Adapter(dense=[DenseTensor(name, base[name].numpy() + 2, base=base[name].numpy())])
    entries = Adapter([changed(name, base[name], [15], [1])])
    apart = Adapter([changed(other, base[other], [7], [1])])
    server = Server(sizes, rank).load(base)
    switcher = Switcher(server, layout=layout)
    switcher.load(whole, 0.5)
    on = state(server)
    with pytest.raises(BaseMismatch, match="another adapter replaces it by other values"):
        switcher.load(again)
    with pytest.raises(BaseMismatch, match="one adapter changes entries of it, another one replaces it"):
        switcher.load(entries)
    assert_same(server, on)
    switcher.load(whole)
    switcher.load(apart)
    assert_same(server, Server(sizes, rank).load(patched(base, [(whole, 1.0), (apart, 1.0)])))
    switcher.revert()
    assert_same(server, Server(sizes, rank).load(base))


def test_two_tensors_with_the_same_entries_of_a_parameter() -> None:
    layout = ServerLayout(4, 2, 4, num_experts=1)
    tensors = [
        changed(f"mlp.experts.0.{name}.weight", torch.zeros(4, 4), [5], [1]) for name in ("w1", "gate_proj")
    ]
    with pytest.raises(
        BaseMismatch, match=r"'mlp\.experts\.0\.gate_proj\.weight', 'mlp\.experts\.0\.w1\.weight' have the same"
    ):
        place_adapter(Adapter(tensors), layout)


# place_adapter


@pytest.mark.parametrize("case", RANKS)
def test_a_placed_adapter_is_an_adapter_of_the_rank(case: str, tmp_path: Path) -> None:
    sizes, ranks = ranks_of(case)
    base = checkpoint(sizes)
    adapter = random_adapter(base, 3)
    save(adapter, tmp_path / "whole.st")
    tuned = patched(base, [(adapter, 1.0)])
    for rank, layout in ranks:
        placed = place_adapter(tmp_path / "whole.st", layout)
        assert placed == place_adapter(adapter, layout)
        save(placed, tmp_path / "rank.st")
        server = Server(sizes, rank).load(base)
        applied = apply(shira.load(tmp_path / "rank.st"), dict(server.named_parameters()))
        assert_same(server, Server(sizes, rank).load(tuned))
        applied.revert()
        for name, tensor in placed.items():  # and without the switcher
            server.get_parameter(name).view(-1)[torch.from_numpy(tensor.indices.copy())] = torch.from_numpy(
                tensor.values.copy()
            )
        for name, whole in placed.dense.items():
            server.get_parameter(name).copy_(torch.from_numpy(whole.values.copy()))
        assert_same(server, Server(sizes, rank).load(tuned))


def test_what_a_placed_adapter_cannot_say() -> None:
    sizes, ranks = ranks_of("one")
    base, layout = checkpoint(sizes), ranks[0][1]
    with pytest.raises(BaseRequired, match="among others in .*pass base="):
        place_adapter(random_adapter(base, 1, self_contained=False), layout)
    whole = DenseTensor("model.layers.0.self_attn.q_proj.bias", np.ones(16, np.float32))
    with pytest.raises(SourceError, match=r"a part of it is replaced, .* strength of 0\.5"):
        place_adapter(Adapter(dense=[whole], manifest={"alpha": 0.5}), layout)
    one, two = (f"model.layers.0.self_attn.{name}_proj.bias" for name in "qk")
    known = DenseTensor(one, np.ones(16, np.float32), base=base[one].numpy())
    digests = Adapter(
        [changed(two, base[two], [3], [1], self_contained=False)],
        dense=[DenseTensor(one, known.values, base_digest=known.base_digest)],
    )
    with pytest.raises(BaseRequired, match="tensors among others in .*pass base="):
        place_adapter(digests, layout)
    q, k = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qk")
    delta = SparseTensor(k, (8, 16), [1], np.float32([1]), value_kind="delta")
    mixed = Adapter([changed(q, base[q], [3], [1]), delta])
    with pytest.raises(SourceError, match="targets and deltas"):
        place_adapter(mixed, layout)
    server = Server(sizes, Rank()).load(base)  # on a model they may lie in one parameter
    switcher = Switcher(server, layout=layout)
    switcher.load(mixed)
    assert_same(server, Server(sizes, Rank()).load(patched(base, [(mixed, 1.0)])))
    switcher.revert()
    assert_same(server, Server(sizes, Rank()).load(base))


# The law


@st.composite
def layouts(draw: st.DrawFn) -> list[ServerLayout]:
    kv_heads = draw(st.sampled_from([1, 2, 3, 4]))
    tp = draw(st.sampled_from([size for size in (1, 2, 3, 4, 6, 8) if not kv_heads % size or not size % kv_heads]))
    heads = draw(st.integers(1, 2)) * int(np.lcm(kv_heads, tp))
    ep = draw(st.sampled_from([1, tp]))
    experts = ep * draw(st.integers(1, 2))
    head, padding = draw(st.integers(1, 3)), tp * draw(st.integers(1, 5))
    return [
        ServerLayout(
            heads, kv_heads, head, tp, rank, num_experts=experts, ep_size=ep, ep_rank=rank if ep > 1 else 0,
            vocabulary_padding=padding, up_first=draw(st.booleans()),
        )
        for rank in range(tp)
    ]  # fmt: skip


def tensors_of(layout: ServerLayout) -> dict[str, tuple[tuple[int, ...], int]]:
    """Shapes of a checkpoint's tensors, and how many ranks have each entry."""
    q, kv, tp = layout.num_heads * layout.head_size, layout.num_kv_heads * layout.head_size, layout.tp_size
    copies = max(1, tp // layout.num_kv_heads)
    inner, hidden = 2 * tp, 3
    found: dict[str, tuple[tuple[int, ...], int]] = {
        "a.q_proj.weight": ((q, hidden), 1), "a.k_proj.weight": ((kv, hidden), copies), "a.v_proj.bias": ((kv,), copies),
        "m.gate_proj.weight": ((inner, hidden), 1), "m.up_proj.bias": ((inner,), 1), "m.gate_up_proj.weight": ((2 * inner, hidden), 1),
        "m.down_proj.weight": ((hidden, inner), 1), "m.down_proj.bias": ((hidden,), tp), "n.norm.weight": ((hidden,), tp),
        "embed_tokens.weight": ((7, hidden), 1), "x.experts.down_proj": ((layout.num_experts, hidden, inner), 1),
        "x.experts.gate_up_proj": ((layout.num_experts, 2 * inner, hidden), 1),
    }  # fmt: skip
    for number in range(layout.num_experts):
        found |= {f"y.experts.{number}.{name}.weight": ((inner, hidden), 1) for name in ("w1", "w3")}
        found[f"y.experts.{number}.w2.weight"] = (hidden, inner), 1
    if layout.num_kv_heads >= layout.tp_size:
        found["b.qkv_proj.weight"] = (q + 2 * kv, hidden), 1
    return found


@given(layouts())
def test_every_entry_is_on_one_rank_or_on_all_of_its_copies(ranks: list[ServerLayout]) -> None:
    for name, (shape, copies) in tensors_of(ranks[0]).items():
        size = int(np.prod(shape))
        original = np.arange(size)
        counts = np.zeros(size, int)
        for layout in ranks:
            placement = layout.place(name, shape)
            held: dict[str, Any] = {}
            for block, at, indices in placement.place(original):
                assert (np.diff(indices) > 0).all()
                array = held.setdefault(block.parameter, np.full(int(np.prod(block.shape)), -1))
                assert (array[indices] == -1).all()  # no two in one place; and within the parameter
                array[indices] = original[at]
                counts[original[at]] += 1
            back = np.sort(np.concatenate([array[array >= 0] for array in held.values()] or [[]]))
            inside = [index for start, stop in placement.ranges for index in range(start, stop)]
            assert set(back) <= set(inside)
            assert all(one[1] < other[0] for one, other in pairwise(placement.ranges))
            some = original[:: max(1, size // 5)]  # a few entries land where they do among all
            for (block, at, indices), (_, all_at, all_indices) in zip(
                placement.place(some),
                [p for p in placement.place(original) if np.isin(original[p[1]], some).any()],
                strict=True,
            ):
                where = dict(zip(original[all_at].tolist(), all_indices.tolist(), strict=True))
                assert indices.tolist() == [where[index] for index in some[at].tolist()], block
        assert (counts == copies).all(), name


@given(layouts(), st.integers(0, 2**32))
def test_all_tensors_fill_the_parameters_without_overlap(ranks: list[ServerLayout], seed: int) -> None:
    names = [name for name in tensors_of(ranks[0]) if not name.startswith(("b.", "m.gate_up"))]
    base = {
        name: torch.from_numpy(
            np.random.default_rng(seed).standard_normal(tensors_of(ranks[0])[name][0]).astype(np.float32)
        )
        for name in names
    }
    adapter = Adapter(
        [changed(name, weight, np.arange(weight.numel()), weight.reshape(-1) + 1) for name, weight in base.items()]
    )
    for layout in ranks:
        placed = place_adapter(adapter, layout)
        for name, tensor in placed.items():
            partly = name in (
                "a.qkv_proj.weight",
                "a.qkv_proj.bias",
                "m.gate_up_proj.bias",
                "m.gate_up_proj.weight",
                "embed_tokens.weight",
            )
            assert partly or tensor.nnz == tensor.numel, name


def test_a_block_outside_of_a_parameter() -> None:
    for block in (
        Block("p", (2, 3), 3, (0, 3), (0, 3)),
        Block("p", (4, 3), 3, (0, 2), (0, 3), row=3),
        Block("p", (4, 3), 3, (0, 2), (0, 2), column=2),
        Block("p", (4, 3), 3, (0, 9), (0, 3)),
        Block("p", (4, 3), 3, (0, 2), (0, 4)),
        Block("p", (4, 3), 3, (0, 2), (0, 3), row=-1),
    ):
        with pytest.raises(SourceError, match="has no rows"):
            Placement("t", (4, 3), 3, (block,))


# Names


def test_names_of_wrapper_models_and_other_engines() -> None:
    layout = ServerLayout(
        4, 2, 4, 2, 1, num_experts=2, prefixes=VISION_LANGUAGE, gate_up="w3_w1_weight", up_first=True
    )

    def block(name: str, *shape: int) -> Block:
        return layout.place(name, shape).blocks[0]

    norm = block("model.language_model.norm.weight", 16)
    assert ("language_model.model.norm.weight", (16,)) == (norm.parameter, norm.shape)
    assert "language_model.lm_head.weight" == block("lm_head.weight", 70, 16).parameter
    up, gate = (
        block(f"model.language_model.layers.0.mlp.experts.1.{name}_proj.weight", 8, 16) for name in ("up", "gate")
    )
    assert (up.parameter, up.row, gate.row) == ("language_model.model.layers.0.mlp.experts.w3_w1_weight", 8, 12)
    more = replace(
        layout,
        layers={"in_proj": ServerLayer("column"), "out_proj": ServerLayer("row"), "x_proj": ServerLayer("whole")},
    )
    assert [(4, 16), (4, 8), (4, 16)] == [
        more.place(f"mixer.{name}.weight", shape).blocks[0].shape
        for name, shape in (("in_proj", (8, 16)), ("out_proj", (4, 16)), ("x_proj", (4, 16)))
    ]


def test_the_layout_of_a_configuration() -> None:
    from transformers import MixtralConfig, Qwen3MoeConfig

    sizes = {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
    mixtral = ServerLayout.of_config(MixtralConfig(**sizes, num_local_experts=8), tp_size=2, tp_rank=1)
    assert mixtral == ServerLayout(4, 2, 4, 2, 1, num_experts=8)
    qwen = ServerLayout.of_config({"text_config": Qwen3MoeConfig(**sizes, head_dim=32, num_experts=6).to_dict()})
    assert qwen == ServerLayout(4, 2, 32, num_experts=6)
    with pytest.raises(SourceError, match="no num_attention_heads"):
        ServerLayout.of_config({})


# The block directory


@pytest.mark.usefixtures("kernels")
def test_a_rank_decodes_its_slice_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    weight = torch.from_numpy(rng.standard_normal((1024, 2048)).astype(np.float32))
    names = [f"model.layers.0.{part}_proj.weight" for part in ("self_attn.q", "self_attn.o")]
    tensors = []
    for name in names:
        at = np.flatnonzero(rng.random(weight.numel()) < 0.05)
        tensors.append(changed(name, weight, at, rng.standard_normal(at.size)))
    save(Adapter(tensors), tmp_path / "x.st")
    counted = [0]
    real = gaps.Gap8.decode

    def counting(self: Any, stored: Any, shape: Any, nnz: int) -> Any:
        counted[0] += nnz
        return real(self, stored, shape, nnz)

    monkeypatch.setattr(gaps.Gap8, "decode", counting)
    together = 0
    for rank in range(4):
        layout = ServerLayout(8, 8, 128, 4, rank)
        counted[0] = 0
        placed = load_placed(tmp_path / "x.st", layout)
        q, o = placed.tensors
        assert placed.decoded == counted[0]
        # Rows: this rank's entries and at most a block more on either side. Columns need all.
        assert q.nnz <= placed.decoded - tensors[1].nnz <= q.nnz + 2 * 4096
        together += o.nnz
        whole = {"self_attn.q": weight, "self_attn.o": weight}
        assert np.array_equal(
            q.base, whole["self_attn.q"].numpy()[rank * 256 : (rank + 1) * 256].reshape(-1)[q.indices]
        )
        assert np.array_equal(o.base, weight.numpy()[:, rank * 512 : (rank + 1) * 512].reshape(-1)[o.indices])
    assert together == tensors[1].nnz


@pytest.mark.usefixtures("kernels")
@given(st.sampled_from(["gap8", "varint"]), st.integers(0, 2**32), st.data())
def test_ranges_of_a_stream(codec_name: str, seed: int, data: st.DataObject) -> None:
    from shira_format.format.codecs import CODECS

    codec, rng = CODECS[codec_name], np.random.default_rng(seed)
    size = data.draw(st.integers(1, 9000))
    indices = np.flatnonzero(rng.random(size) < data.draw(st.sampled_from([0.003, 0.05, 0.9])))
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    stored = codec.encode(indices, (size,), 16)
    found = codec.decode_range(stored, (size,), indices.size, start, stop)
    if stored.blocks is None:
        assert found is None
        return
    assert found is not None
    expected = indices[(indices >= start) & (indices < stop)]
    assert np.array_equal(found.indices, expected)
    assert not expected.size or indices[found.first] == expected[0]
    assert found.decoded <= expected.size + 32


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("codec_name", ["gap8", "varint"])
def test_a_damaged_directory_is_refused(codec_name: str) -> None:
    from shira_format.format.codecs import CODECS, Encoded

    codec, rng = CODECS[codec_name], np.random.default_rng(0)
    indices = np.flatnonzero(rng.random(4000) < 0.1)
    stored = codec.encode(indices, (4000,), 16)
    assert stored.blocks is not None
    for row, column, step in (
        (0, 0, 1),
        (3, 0, 1),
        (3, 1, 1),
        (4, 0, -200),
        (4, 1, -1),
        (len(stored.blocks) - 1, 0, 10**6),
    ):
        blocks = stored.blocks.copy()
        blocks[row, column] += step
        # A range whose blocks use the row, on either side of it.
        for start, stop in ((0, 4000), (0, int(indices[80]))):
            with pytest.raises(FormatError):
                codec.decode_range(
                    Encoded(stored.params, stored.stream, blocks), (4000,), indices.size, start, stop
                )


def test_a_damaged_stream_is_refused_by_every_rank_that_reads_it(tmp_path: Path) -> None:
    sizes, ranks = ranks_of("a KV head for each rank")
    base = checkpoint(sizes)
    save(random_adapter(base, 1), tmp_path / "a.st")
    data = bytearray((tmp_path / "a.st").read_bytes())
    data[-3] ^= 1
    (tmp_path / "a.st").write_bytes(data)
    for rank, layout in ranks:
        server = Server(sizes, rank).load(base)
        before = state(server)
        with pytest.raises(FormatError, match="digest"):
            Switcher(server, layout=layout).load(tmp_path / "a.st")
        assert_same(server, before)


def test_patches_and_masks_are_refused(tmp_path: Path) -> None:
    layout = ServerLayout(4, 2, 4, 2)
    name = "model.layers.0.self_attn.q_proj.weight"
    mask = SparseTensor(name, (16, 16), [1], value_kind="none")
    patch = SparseTensor(name, (16, 16), [1], np.float32([1]), base=np.float32([0]), base_name="other")
    for adapter, reason in (
        (Adapter([mask]), "is a mask"),
        (Adapter([patch]), "renames or resizes"),
        (Adapter(manifest={"removed": ["x"]}), "removes"),
    ):
        with pytest.raises(BaseMismatch, match=reason):
            place_adapter(adapter, layout)
        save(adapter, tmp_path / "x.st")
        with pytest.raises(BaseMismatch, match=rf"x\.st: .*{reason}"):
            place_adapter(tmp_path / "x.st", layout)
