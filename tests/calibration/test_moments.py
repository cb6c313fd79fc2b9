"""Second moments against float64 sums over all tokens at once."""

import pytest
import torch

from lowbit.calibration.moments import Moments
from lowbit.calibration.outputs import Output

LENGTHS = (5, 1, 40, 13, 0, 97)


def streams(features, lengths=LENGTHS, seed=0):
    """[(x, f)] of batches, float32: inputs with a mean, and the original ones that they have moved away from. Batches
    are of different sizes, so that a mean over batches shows."""
    rng = torch.Generator().manual_seed(seed)
    scale = torch.rand(features, generator=rng) + 0.5
    batches = []
    for number, length in enumerate(lengths):
        f = (torch.randn(length, features, generator=rng) + 0.5) * scale * (1 + number)
        batches.append((0.9 * f + 0.1 * torch.randn(length, features, generator=rng), f))
    return batches


def measured(batches, features, **options):
    moments = Moments(features, **options)
    for x, f in batches:
        moments.add(x, f)
    moments.finish()
    return moments


def expected(batches):
    """float64 (mean x x^T, mean (f - x) x^T) over tokens."""
    x, f = (torch.cat(parts).double() for parts in zip(*batches, strict=True))
    return x.T @ x / len(x), (f - x).T @ x / len(x)


def drift_of(moments):
    """[K, K]: what a weight that changes nothing would be missing."""
    return moments.missing(torch.eye(len(moments.hessian)))


def assert_moment(actual, wanted, batches):
    """Up to float32 sums: relative to the size of the two inputs that are multiplied."""
    assert actual.dtype == torch.float32
    sizes = torch.cat([x for x, _ in batches]).double().square().mean(0).sqrt()
    assert ((actual.double() - wanted).abs() <= 1e-6 * sizes[:, None] * sizes).all()


# around the sizes of the blocks that are multiplied, and where they leave a rest
@pytest.mark.parametrize("features", [1, 2, 33, 255, 256, 257, 513, 1000, 2049])
def test_means_over_tokens(features):
    batches = streams(features)
    before = [(x.clone(), f.clone()) for x, f in batches]
    moments = measured(batches, features)
    hessian, drift = expected(batches)
    assert moments.tokens == sum(LENGTHS)
    assert_moment(moments.hessian, hessian, batches)
    assert_moment(drift_of(moments), drift, batches)
    assert torch.equal(moments.hessian, moments.hessian.T) or features > 256  # beyond, blocks are rounded each alone
    assert (moments.hessian - moments.hessian.T).abs().max() <= 1e-6 * moments.hessian.abs().max()
    for (x, f), (old_x, old_f) in zip(batches, before, strict=True):
        assert torch.equal(x, old_x) and torch.equal(f, old_f)


def test_how_tokens_are_batched_does_not_matter():
    batches = streams(33)
    x, f = (torch.cat(parts) for parts in zip(*batches, strict=True))
    whole = measured([(x, f)], 33)
    for size in (1, 10, 100):
        parts = measured(zip(x.split(size), f.split(size), strict=True), 33)
        torch.testing.assert_close(parts.hessian, whole.hessian)
        torch.testing.assert_close(drift_of(parts), drift_of(whole), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_float32(dtype):
    """A sum in half precision would stop growing (bfloat16: at 256 ones)."""
    x = torch.ones(3000, 3, dtype=dtype)
    moments = measured([(x, 2 * x)], 3)
    assert (moments.hessian == 1).all() and (drift_of(moments) == 1).all()
    assert moments.hessian.dtype == drift_of(moments).dtype == torch.float32


def test_one_stream_has_not_drifted():
    moments = Moments(33)
    for x, _ in streams(33):
        moments.add(x)
    moments.finish()
    assert (drift_of(moments) == 0).all() and moments.hessian.diagonal().min() > 0
    x, f = moments.samples
    assert torch.equal(x, f)


def test_without_drift():
    batches = streams(33)
    moments = measured(batches, 33, wanted=("hessian",))
    assert drift_of(moments) is None
    assert torch.equal(moments.hessian, measured(batches, 33).hessian)


@pytest.mark.parametrize("wanted", [(), ("missing",)])
def test_without_hessian(wanted):
    """The samples are the same, and so is the other moment."""
    batches = streams(33)
    moments, both = measured(batches, 33, wanted=wanted), measured(batches, 33)
    weight = torch.eye(33)
    assert moments.hessian is None and moments.tokens == sum(LENGTHS)
    assert all(torch.equal(*pair) for pair in zip(moments.samples, both.samples, strict=True))
    assert torch.equal(moments.missing(weight), both.missing(weight)) if wanted else moments.missing(weight) is None


def test_moments_of_no_tokens_are_zero():
    moments = Moments(4)
    moments.add(torch.empty(0, 4), torch.empty(0, 4))
    moments.finish()
    assert moments.tokens == 0 and (moments.hessian == 0).all() and (drift_of(moments) == 0).all()
    assert [len(sample) for sample in moments.samples] == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_missing_of_several_weights_and_of_one(dtype):
    """W D for any weight; summed for one weight alone it is the same, and all of it can be asked for in parts."""
    batches = streams(33)
    weights = [torch.randn(rows, 33, generator=torch.Generator().manual_seed(rows)).to(dtype) for rows in (7, 40)]
    several = measured(batches, 33)
    for weight in weights:
        wanted = weight.double() @ expected(batches)[1]
        for moments in (several, measured(batches, 33, output=Output(weight))):
            missing = moments.missing(weight)
            assert missing.dtype == torch.float32 and float((missing - wanted).norm() / wanted.norm()) < 1e-5
            parts = [moments.missing(weight, rows) for rows in (slice(0, 5), slice(5, None))]
            torch.testing.assert_close(torch.cat(parts), missing)


def test_drift_of_the_residual_stream():
    """It is added to what the output lacks."""
    batches, weight = streams(33), torch.randn(7, 33, generator=torch.Generator().manual_seed(1))
    moments = Moments(33, output=Output(weight))
    residuals = [torch.randn(len(x), 7, generator=torch.Generator().manual_seed(len(x))) for x, _ in batches]
    for (x, f), residual in zip(batches, residuals, strict=True):
        moments.add(x, f, residual)
    moments.finish()
    x = torch.cat([x for x, _ in batches]).double()
    wanted = weight.double() @ expected(batches)[1] + torch.cat(residuals).double().T @ x / len(x)
    assert float((moments.missing(weight) - wanted).norm() / wanted.norm()) < 1e-5


@pytest.mark.parametrize("wanted", [("hessian", "missing"), ("hessian",)], ids="-".join)
def test_merged_processes_equal_one(wanted):
    """Three ranks, one of which has seen nothing."""
    batches = streams(300)
    ranks = [Moments(300, wanted=wanted) for _ in range(3)]
    for number, (x, f) in enumerate(batches):
        ranks[number % 2].add(x, f)
    given = []
    for rank in ranks:
        given.append([])
        rank.merge(lambda tensor: given[-1].append(tensor.clone()))
    sums = [sum(tensors) for tensors in zip(*given, strict=True)]
    whole = measured(batches, 300, wanted=wanted)
    for rank in ranks:
        left = iter(sums)
        rank.merge(lambda tensor, left=left: tensor.copy_(next(left)))
        rank.finish()
        assert rank.tokens == whole.tokens and next(left, None) is None
        assert_moment(rank.hessian, expected(batches)[0], batches)
        torch.testing.assert_close(rank.hessian, whole.hessian)
        if "missing" in wanted:
            assert_moment(drift_of(rank), expected(batches)[1], batches)
        else:
            assert drift_of(rank) is None


@pytest.mark.parametrize("lengths", [(3,), (1,) * 10, (7, 100), (2000,), (300, 1) * 40, (15,) * 200])
def test_samples(lengths):
    """At most 256 tokens, from the first batch to the last, f row by row that of x."""
    batches, first = [], 0
    for length in lengths:
        number = torch.arange(first, first + length, dtype=torch.float32).unsqueeze(1)
        batches.append((torch.cat([number, number], 1), torch.cat([number, -number], 1)))
        first += length
    x, f = measured(batches, 2).samples
    assert min(len(lengths), 50) <= len(x) <= 256 and len(f) == len(x)
    assert torch.equal(x[:, 0], f[:, 0]) and torch.equal(x[:, 1], -f[:, 1])
    assert (x[1:, 0] > x[:-1, 0]).all()  # each token once, in order
    assert x[0, 0] <= 0.05 * first and x[-1, 0] >= 0.8 * (first - 1)


def test_samples_are_copies():
    x = torch.ones(4, 2)
    moments = Moments(2)
    moments.add(x)
    x.zero_()
    assert all((sample == 1).all() for sample in moments.samples)
