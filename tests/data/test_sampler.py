import pytest

from mhf_lightning.data.errors import DataError
from mhf_lightning.data.sampler import GlobalOrderSampler, SequentialSampler, permutation

N, TOTAL, GLOBAL_BATCH = 37, 160, 16  # more than four passes over the data


def batches(world_size, micro_batch_size, start=0, seed=5):
    """Batches of each rank."""
    return [
        list(
            GlobalOrderSampler(N, TOTAL, seed, start, rank, world_size, micro_batch_size=micro_batch_size)
        )
        for rank in range(world_size)
    ]  # fmt: skip


def reference_order(seed=5):
    passes = [permutation(N, seed, number).tolist() for number in range(TOTAL // N + 1)]
    return [block for order in passes for block in order][:TOTAL]


def test_each_pass_is_a_permutation_of_its_own():
    orders = [permutation(N, 5, number).tolist() for number in range(4)]
    assert all(sorted(order) == list(range(N)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert permutation(N, 6, 0).tolist() != orders[0]


def test_the_order_is_fixed_for_all_time():
    # A change here would move the data under every run that continues.
    assert permutation(8, 1234, 0).tolist() == [5, 6, 3, 7, 4, 1, 2, 0]


@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 16), (1, 4), (2, 8), (2, 1), (4, 4), (4, 2)])
def test_steps_do_not_depend_on_the_ranks(world_size, micro_batch_size):
    ranks = batches(world_size, micro_batch_size)
    accumulated = GLOBAL_BATCH // (world_size * micro_batch_size)
    order = reference_order()
    for step in range(TOTAL // GLOBAL_BATCH):
        micro = range(step * accumulated, (step + 1) * accumulated)
        seen = [block for number in micro for rank in ranks for block in rank[number]]
        assert seen == order[step * GLOBAL_BATCH : (step + 1) * GLOBAL_BATCH]


def test_ranks_are_disjoint():
    for step in range(N // 8):  # within the first pass
        shares = [set(rank[step]) for rank in batches(4, 2)]
        assert len(set.union(*shares)) == 8


@pytest.mark.parametrize("start", [0, 16, 32, 48, 112, 160])
def test_resume_is_the_tail(start):
    for world_size in (1, 2, 4):
        whole, resumed = batches(world_size, 4), batches(world_size, 4, start)
        for rank in range(world_size):
            assert resumed[rank] == whole[rank][start // (world_size * 4) :]


def test_resume_on_another_number_of_ranks():
    before = batches(4, 2)
    after = batches(2, 8, start=48)
    first = [block for number in range(48 // 8) for rank in before for block in rank[number]]
    second = [block for number in range((TOTAL - 48) // 16) for rank in after for block in rank[number]]
    assert first + second == reference_order()


def test_length_is_that_of_the_whole_run():
    assert len(GlobalOrderSampler(N, TOTAL, 5, 48, 1, 2, micro_batch_size=4)) == TOTAL // 8


def test_iterating_twice_gives_the_same():
    sampler = GlobalOrderSampler(N, TOTAL, 5, micro_batch_size=4)
    assert list(sampler) == list(sampler)


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"start": 5}, r"start is 5; it must be a multiple of 8 .*keep the global batch"),
        ({"total_samples": 165}, "total_samples is 165"),
        ({"start": 168}, r"168 samples were consumed already.*Raise trainer.max_steps"),
        ({"start": -8}, "start is -8"),
        ({"rank": 2}, "rank 2 is not one of 2 ranks"),
        ({"seed": -1}, "must not be negative"),
        ({"micro_batch_size": 0}, "micro_batch_size is 0"),
        ({"num_samples_in_dataset": 0}, "no blocks"),
    ],
)
def test_bad_values(changed, problem):
    good = {"num_samples_in_dataset": N, "total_samples": TOTAL, "seed": 5, "world_size": 2, "micro_batch_size": 4}
    GlobalOrderSampler(**good)
    with pytest.raises(DataError, match=problem):
        GlobalOrderSampler(**{**good, **changed})


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("samples", [1, 12, 13, 24])
def test_sequential_covers_all_once_with_equal_batches(world_size, samples):
    ranks = [list(SequentialSampler(samples, 4, rank, world_size)) for rank in range(world_size)]
    sampler = SequentialSampler(samples, 4, 0, world_size)
    assert {len(rank) for rank in ranks} == {len(sampler)}
    assert len(sampler) % 4 == 0
    seen = sorted(index for rank in ranks for index in rank)
    assert seen == list(range(sampler.padded_samples))
    assert samples <= sampler.padded_samples < samples + 4 * world_size
    assert all(rank == sorted(rank) for rank in ranks)  # padding comes last
