"""Probes against brute force, planted signals of known strength, and entropies known in closed form."""

import numpy as np
import pytest
import torch
from scipy.stats import norm

from sinkstudy.analyses import probing


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("n, width", [(40, 7), (12, 30)])  # more rows than dimensions, and fewer
def test_ridge_is_the_penalised_least_squares_solution_with_the_best_leave_one_out_error(n, width):
    tokens, new = normal(n, width) * torch.linspace(0.1, 9, width) + 5, normal(6, width, seed=1) + 5
    y = (tokens @ normal(width, 2, seed=2) + 20 * normal(n, 2, seed=3)).numpy()
    mean, sd = tokens.numpy().mean(0), tokens.numpy().std(0)
    x, x_new = (tokens.numpy() - mean) / sd, (new.numpy() - mean) / sd

    def solve(x, y, penalty):
        """min |y - b - x w|² + n penalty |w|², as least squares with rows added."""
        design = np.block([[x, np.ones((len(x), 1))], [np.sqrt(n * penalty) * np.eye(width), np.zeros((width, 1))]])
        return np.linalg.lstsq(design, np.vstack([y, np.zeros((width, 2))]), rcond=None)[0]

    def leave_one_out(penalty):
        errors = 0
        for i in range(n):
            others = np.arange(n) != i
            weights = solve(x[others], y[others], penalty)
            errors += ((y[i] - x[i] @ weights[:-1] - weights[-1]) ** 2).sum()
        return errors

    best = min(probing.PENALTIES, key=leave_one_out)
    weights = solve(x, y, best)
    found = probing.Ridge(tokens).predict(torch.tensor(y), new)
    np.testing.assert_allclose(found.numpy(), x_new @ weights[:-1] + weights[-1], rtol=1e-6, atol=1e-6)


def test_a_planted_signal_is_read_as_often_as_the_best_reader_could():
    labels = torch.arange(6000) % 2
    direction = normal(12, seed=1) / normal(12, seed=1).norm()
    tokens = normal(6000, 12) + 0.8 * (2 * labels[:, None] - 1) * direction  # two normals at ± 0.8
    said = probing.Ridge(tokens[:3000]).classify(labels[:3000], tokens[3000:])
    assert (said == labels[3000:]).double().mean() == pytest.approx(norm.cdf(0.8), abs=0.02)


def test_where_there_is_no_signal_it_is_read_by_chance():
    tokens, labels = normal(3000, 16), torch.arange(3000) % 5
    said = probing.Ridge(tokens[:1500]).classify(labels[:1500], tokens[1500:])
    assert (said == labels[1500:]).double().mean() == pytest.approx(0.2, abs=0.04)


def test_labels_dealt_anew_are_read_by_chance():
    labels = torch.arange(3000) % 4
    tokens = normal(3000, 16) + 3 * torch.nn.functional.one_hot(labels, 16)
    dealt = labels[torch.randperm(3000, generator=torch.Generator().manual_seed(0))]
    ridge = probing.Ridge(tokens[:1500])
    assert (ridge.classify(labels[:1500], tokens[1500:]) == labels[1500:]).double().mean() > 0.9
    said = ridge.classify(dealt[:1500], tokens[1500:])
    assert (said == dealt[1500:]).double().mean() == pytest.approx(0.25, abs=0.04)


def test_classes_keep_their_names_and_an_idle_dimension_says_nothing():
    labels = torch.tensor([7, -3] * 20)
    tokens = torch.stack([labels.double() + 0.1 * normal(40), torch.full((40,), 3.0, dtype=torch.float64)], 1)
    elsewhere = tokens + torch.tensor([0.0, 1e6])
    assert torch.equal(probing.Ridge(tokens).classify(labels, elsewhere), labels)


@pytest.mark.parametrize("tokens", [normal(2, 4), torch.full((9, 4), float("nan"))])
def test_too_few_tokens_or_none(tokens):
    with pytest.raises(ValueError, match="three rows of finite values"):
        probing.Ridge(tokens)


def test_explained_variance_and_its_spread_are_those_of_the_ratio():
    truth = normal(400, 2, 3) * (1 + torch.arange(400)[:, None, None] / 100)  # pictures of unequal weight
    said = 0.7 * truth + 0.5 * normal(400, 2, 3, seed=1)
    truth[::3, 1] = said[::3, 1] = float("nan")  # some have one token
    added = probing.explained_variance(truth, said)

    def direct(pictures):
        y, mean = truth[pictures].flatten(0, 1), truth.flatten(0, 1).nanmean(0)
        there = y[:, 0].isfinite()
        sse, sst = (y - said[pictures].flatten(0, 1))[there].square().sum(), (y - mean)[there].square().sum()
        return 1 - (sse / sst).item()

    assert added.mean() == pytest.approx(direct(np.arange(400)), abs=1e-12)
    rng = np.random.default_rng(0)
    drawn = [direct(rng.integers(0, 400, 400)) for _ in range(1000)]
    assert added.std() / 20 == pytest.approx(np.std(drawn), rel=0.1)  # standard error of the mean of 400
    assert np.isnan(probing.explained_variance(torch.ones(4, 1, 2), torch.ones(4, 1, 2))).all()


def test_entropy_in_bits():
    counts = np.array([[1, 1, 1, 1], [5, 0, 0, 0], [0, 0, 0, 0], [2, 1, 1, 0]])
    np.testing.assert_allclose(probing.entropy(counts), [2, 0, 0, 1.5])


def test_one_fixed_word_against_eight():
    """Both say three words a picture: one always the same, the control any of eight. log2(8) = 3 bits apart."""
    rng = np.random.default_rng(0)
    fixed = np.zeros((400, 8))
    fixed[:, 2] = 3
    any_of = rng.multinomial(3, np.full(8, 1 / 8), (5, 400))
    value, low, high, n = probing.entropy_difference(fixed, any_of)
    assert value == pytest.approx(-3, abs=0.02) and low <= value + 0.02 and high < -2.9 and n == 400


def test_entropies_of_one_distribution_do_not_differ():
    """Of as many words each: 60 repetitions, of which the 95 % interval may miss zero in some."""
    rng = np.random.default_rng(1)
    share = rng.dirichlet(np.ones(20))
    missed = 0
    for _ in range(60):
        drawn = rng.multinomial(3, share, (2, 80))
        interval = probing.entropy_difference(drawn[0], drawn[1:])
        missed += not interval.low <= 0 <= interval.high
    assert missed <= 9  # 15 %; binomial(60, 0.05) exceeds it once in 2000


def test_without_words_there_is_no_entropy():
    value, low, high, n = probing.entropy_difference(np.zeros((5, 3)), np.zeros((2, 5, 3)))
    assert np.isnan([value, low, high]).all() and n == 0
