"""Criteria on hand-made tensors whose answer is known."""

import math

import pytest
import torch

from sinkstudy import sinks


def image(*outliers: float, n: int = 144) -> torch.Tensor:
    """Norms of n tokens between 0.9 and 1.1 (median 1), with the outliers at tokens 0, 10, 20, …"""
    norms = torch.linspace(0.9, 1.1, n)[torch.randperm(n, generator=torch.Generator().manual_seed(0))]
    norms[[10 * i for i in range(len(outliers))]] = torch.tensor(outliers)
    return norms


def where(mask: torch.Tensor) -> list[int]:
    return mask.nonzero().flatten().tolist()


def test_absolute():
    assert sinks.absolute(torch.tensor([99.9, 100.0, 250.0])).tolist() == [False, True, True]
    assert sinks.absolute(torch.tensor([[1.0, 3.0]]), tau=2).tolist() == [[False, True]]


def test_mean_sd_by_hand():
    norms = torch.tensor([1.0] * 99 + [11.0])  # mean 1.1, population sd 0.995
    assert where(sinks.mean_sd(norms, k=9.9)) == [99]
    assert where(sinks.mean_sd(norms, k=10)) == []


def test_mean_sd_goes_blind_where_the_docstring_says():
    for m, found in ((14, 14), (15, 0)):
        norms = torch.tensor([5.0] * m + [1.0] * (144 - m))
        assert sinks.mean_sd(norms).sum(-1) == found


def test_relative_criteria_find_planted_sinks():
    norms = torch.stack([image(4.0, 3.6, 3.2), image(), image(6.0)])
    expected = [[0, 10, 20], [], [0]]
    for criterion in (sinks.mean_sd, sinks.above_median, sinks.norm_drop):
        assert [where(mask) for mask in criterion(norms)] == expected, criterion.__name__


def test_criteria_judge_each_image_and_layer_alone():
    norms = torch.stack([image(4.0), 50 * image(4.0, 4.0)])
    for criterion in (sinks.mean_sd, sinks.above_median, sinks.norm_drop, sinks.percentile):
        alone = torch.stack([criterion(row) for row in norms])
        assert torch.equal(criterion(norms), alone)
        assert torch.equal(criterion(norms[:, None]), alone[:, None])


def test_percentile():
    norms = torch.arange(1.0, 101.0)  # 98th percentile: 98.02
    assert where(sinks.percentile(norms)) == [98, 99]
    assert where(sinks.percentile(norms, q=50)) == list(range(50, 100))


def test_norm_drop_by_hand():
    norms = torch.tensor([2.0, 9.0, 1.8, 8.0, 1.9, 1.7, 1.6, 1.5])  # 9, 8 | 2, 1.9, …: the drop is 8 / 2
    assert where(sinks.norm_drop(norms)) == [1, 3]
    assert where(sinks.norm_drop(norms, min_ratio=4.0)) == [1, 3]
    assert where(sinks.norm_drop(norms, min_ratio=4.1)) == []
    assert where(sinks.norm_drop(norms, top=0.125)) == []  # only 9 / 8 is looked at
    low_tail = torch.tensor([1.0] * 7 + [0.01])  # a drop among the lowest is no sink
    assert where(sinks.norm_drop(low_tail)) == []


def test_norm_criteria_by_name():
    norms = torch.stack([image(4.0, 3.5), image()])
    for name, threshold in {
        "absolute": 2,
        "mean_sd": 3,
        "percentile": 99,
        "above_median": 3,
        "norm_drop": 2,
    }.items():
        assert where(sinks.NORM_CRITERIA[name](norms, threshold)[0]) == [0, 10], name
    assert {function.__name__ for function in sinks.NORM_CRITERIA.values()} == set(sinks.NORM_CRITERIA)


def test_max_median_ratio():
    norms = torch.tensor([[1.0, 2.0, 3.0, 12.0], [2.0, 2.0, 2.0, 2.0]])
    assert sinks.max_median_ratio(norms).tolist() == pytest.approx([12 / 2.5, 1.0])
    assert where(sinks.above_median(norms[0], ratio=4.8)) == [3]


def test_norm_summary():
    norms = torch.tensor([[-1.0, 1.0] * 50, [-1.0, 1.0] * 50]) + 10  # two values: kurtosis 1, so excess -2
    summary = sinks.norm_summary(norms)
    assert summary == pytest.approx(
        {"median": 10, "p99": 11, "max_over_median": 1.1, "share_above_3sd": 0, "kurtosis": -2}
    )
    heavy = sinks.norm_summary(image(9.0)[None])
    assert heavy["share_above_3sd"] == pytest.approx(1 / 144) and heavy["kurtosis"] > 100
    normal = torch.randn(20, 50_000, generator=torch.Generator().manual_seed(0))
    assert sinks.norm_summary(normal)["kurtosis"] == pytest.approx(0, abs=0.05)


def test_attended():
    received = torch.tensor([0.1, 0.5, 0.9])
    assert where(sinks.attended(received, uniform=0.1)) == [2]  # 0.5 is not more than 5 x 0.1
    assert where(sinks.attended(received, uniform=torch.tensor([0.01, 0.2, 0.2]))) == [0]


def test_causal_uniform():
    assert sinks.causal_uniform(3).tolist() == pytest.approx([(1 + 1 / 2 + 1 / 3) / 3, (1 / 2 + 1 / 3) / 2, 1 / 3])
    n = 50
    uniform = torch.ones(n, n).tril() / torch.arange(1, n + 1)[:, None]
    expected = uniform.sum(0) / torch.arange(n, 0, -1)
    torch.testing.assert_close(sinks.causal_uniform(n), expected)


def test_sink_epsilon():
    received = torch.zeros(2, 3, 5)  # layers, heads, tokens
    received[:, :, 0] = 0.31
    received[0, 0, 1] = 0.9
    received[:, :, 2] = 0.3
    assert sinks.sink_epsilon(received).tolist() == pytest.approx([1, 1 / 6, 0, 0, 0])
    assert sinks.sink_epsilon(received.expand(7, 2, 3, 5)).shape == (7, 5)


def test_rms_and_phi():
    hidden = torch.tensor([[3.0, 4.0, 0.0, 0.0], [0.0, 0.0, 0.0, -8.0]])  # rms 2.5 and 4
    torch.testing.assert_close(
        sinks.rms_normalised(hidden), torch.tensor([[1.2, 1.6, 0.0, 0.0], [0.0, 0.0, 0.0, -2.0]])
    )
    assert sinks.phi(hidden, [0, 3]).tolist() == pytest.approx([1.2, 2.0])
    assert sinks.phi(hidden, []).tolist() == [0, 0]
    assert sinks.llm_sinks(hidden, [0, 3], tau=1.5).tolist() == [False, True]
    with pytest.raises(ValueError, match=r"at most sqrt\(4\) = 2.0"):
        sinks.llm_sinks(hidden, [0], tau=20)


def test_sink_dimensions_from_data():
    hidden = torch.randn(3, 20, 64, generator=torch.Generator().manual_seed(0))
    group = torch.zeros(3, 20, dtype=torch.bool)
    group[:, [4, 7]] = True
    hidden[..., 11][group] = 60.0
    hidden[..., 50][group] = -90.0
    assert sinks.sink_dimensions(sinks.dimension_profile(hidden, group)) == [50, 11]
    assert sinks.sink_dimensions(sinks.dimension_profile(hidden, ~group)) == []
    assert sinks.dimension_profile(hidden).shape == (64,)
    assert torch.equal(sinks.llm_sinks(hidden, [50, 11], tau=4), group)


def test_shares():
    mask = torch.tensor([[True, False, True, False], [False] * 4])
    assert sinks.share(mask).tolist() == [0.5, 0]


def test_kinds_partition():
    vit = torch.tensor([True, True, False, False])
    llm = torch.tensor([True, False, True, False])
    kinds = sinks.kinds(vit, llm)
    assert {name: where(mask) for name, mask in kinds.items()} == {
        "propagated": [0],
        "emerged": [2],
        "stopped": [1],
        "ordinary": [3],
    }


def test_jaccard():
    a = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]).bool()
    b = torch.tensor([[1, 0, 1, 0], [1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    assert sinks.jaccard(a, b).tolist() == pytest.approx([1 / 3, 1, 0, 1])
    assert math.isnan(sinks.jaccard(a, b, empty=math.nan)[3])


def test_agreement():
    some, none = torch.tensor([[True, False], [True, True]]), torch.zeros(2, 2, dtype=torch.bool)
    first = torch.tensor([[True, False], [True, False]])
    table = sinks.pairwise_jaccard({"a": some, "b": first, "c": none})
    assert list(table.columns) == ["image", "first", "second", "jaccard", "both_empty"]
    means = table.groupby(["first", "second"]).jaccard.mean().to_dict()
    assert means == pytest.approx({("a", "b"): 0.75, ("a", "c"): 0, ("b", "c"): 0})
    assert len(table) == 6 and not table.both_empty.any()
    assert sinks.pairwise_jaccard({"a": none, "b": none}).both_empty.all()
    with pytest.raises(ValueError, match="two criteria"):
        sinks.pairwise_jaccard({"a": none})


def test_random_like_takes_as_many_others_and_every_other_alike():
    mask = torch.zeros(4000, 6, dtype=torch.bool)
    mask[:, :2] = True
    mask[0] = False
    among = torch.tensor([True, False, True, True, True, False])
    drawn = sinks.random_like(mask, seed=3, among=among)
    assert not (drawn & mask).any() and torch.equal(drawn.sum(-1), mask.sum(-1))
    assert drawn[:, 5].sum() == 0
    shares = drawn[1:, 2:5].float().mean(0)  # two of three tokens each
    assert (shares - 2 / 3).abs().max() < 4 * (2 / 9 / 3999) ** 0.5
    assert torch.equal(drawn, sinks.random_like(mask, seed=3, among=among))
    assert not torch.equal(drawn, sinks.random_like(mask, seed=4, among=among))
    assert sinks.random_like(torch.tensor([True, True, False]), seed=0).tolist() == [False, False, True]


def test_next_in_norm_are_the_highest_outside():
    norms = torch.tensor([[9.0, 1.0, 5.0, 7.0, 3.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
    mask = torch.tensor([[True, False, False, True, False], [False] * 5])
    assert sinks.next_in_norm(norms, mask).tolist() == [[False, False, True, False, True], [False] * 5]
    among = torch.tensor([[True, True, False, True, True], [True] * 5])
    assert sinks.next_in_norm(norms, mask, among)[0].tolist() == [False, True, False, False, True]
    few = torch.tensor([[True, True, True, False, False], [False] * 5])
    assert not sinks.next_in_norm(norms, mask, few)[0, 3:].any()  # rather too few than one that is not among them
