"""A data order that any number of ranks can go on with: nothing is lost, and nothing comes twice."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ft_launcher.checkpoint import ResumableSampler


def samplers(size, world_size, state=None, **more):
    """Make the samplers of all ranks, where a state says."""
    made = [ResumableSampler(size, rank=rank, world_size=world_size, **more) for rank in range(world_size)]
    for each in made:
        if state is not None:
            each.load_state_dict(state)
    return made


def batches(sampler, size):
    """Give the rank's batches as a data loader does."""
    indices = list(sampler)
    return [indices[start : start + size] for start in range(0, len(indices), size)]


@given(
    size=st.integers(1, 60),
    seed=st.integers(0, 5),
    phases=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(0, 6)), max_size=6),
)
def test_no_sample_is_lost_or_seen_twice_whatever_the_world_sizes_were(size, seed, phases):
    """Phases: the number of ranks, of samples in a batch, of batches until the number of ranks changes."""
    seen = []
    state = samplers(size, 1, seed=seed)[0].state_dict()
    for world_size, batch_size, count in phases:
        ranks = samplers(size, world_size, state, seed=seed, drop_last=False)
        of_ranks = [batches(each, batch_size) for each in ranks]
        for index in range(count):
            step = [batch for of_rank in of_ranks for batch in of_rank[index : index + 1]]
            trained = [sample for batch in step for sample in batch]
            seen += trained
            for each in ranks:
                each.advance(len(trained))
        assert all(each.state_dict() == ranks[0].state_dict() for each in ranks)
        state = ranks[0].state_dict()
    (rest,) = samplers(size, 1, state, seed=seed)
    assert sorted(seen + list(rest)) == list(range(size))


@given(size=st.integers(1, 60), world_size=st.integers(1, 6), position=st.integers(0, 70))
def test_with_drop_last_all_ranks_have_as_many_and_less_than_one_round_is_left_out(size, world_size, position):
    ranks = samplers(size, world_size)
    for each in ranks:
        each.advance(position)
    indices = [list(each) for each in ranks]
    assert [len(each) for each in ranks] == [len(each) for each in indices]
    assert len({len(each) for each in indices}) == 1
    together = [index for of_rank in indices for index in of_rank]
    assert len(set(together)) == len(together)
    assert 0 <= max(size - position, 0) - len(together) < world_size


@given(size=st.integers(1, 60), world_size=st.integers(1, 6), position=st.integers(0, 70))
def test_without_drop_last_the_length_is_the_number_of_indices_and_none_is_left_out(size, world_size, position):
    ranks = samplers(size, world_size, drop_last=False)
    for each in ranks:
        each.advance(position)
    indices = [list(each) for each in ranks]
    assert [len(each) for each in ranks] == [len(each) for each in indices]
    assert sum(map(len, indices)) == max(size - position, 0)


def test_an_epochs_order_depends_on_the_seed_and_the_epoch_alone():
    orders = set()
    for seed in (0, 1):
        first, second = ResumableSampler(50, rank=0, world_size=1, seed=seed), samplers(50, 1, seed=seed)[0]
        for _ in range(3):
            assert list(first) == list(second)
            orders.add(tuple(first))
            first.next_epoch()
            second.next_epoch()
    assert len(orders) == 6


def test_without_shuffle_the_order_is_that_of_the_indices():
    ranks = samplers(10, 2, shuffle=False)
    assert [list(each) for each in ranks] == [[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]]


def test_the_next_epoch_begins_at_its_begin():
    sampler = ResumableSampler(10, rank=0, world_size=1)
    sampler.advance(4)
    sampler.next_epoch()
    assert (sampler.epoch, sampler.position, len(sampler)) == (1, 0, 10)


@pytest.mark.parametrize("differing", [{"size": 11}, {"seed": 3}])
def test_the_state_of_other_data_or_another_order_is_refused_and_changes_nothing(differing):
    sampler = ResumableSampler(10, rank=0, world_size=1)
    other = ResumableSampler(**({"size": 10, "rank": 0, "world_size": 1} | differing))
    other.advance(5)
    with pytest.raises(ValueError, match=f"another {next(iter(differing))}"):
        sampler.load_state_dict(other.state_dict())
    assert sampler.position == 0


@pytest.mark.parametrize("numbers", [(0, 0, 1), (10, 2, 2), (10, -1, 2), (10, 0, 0)])
def test_numbers_that_cannot_be_meant_are_refused(numbers):
    size, rank, world_size = numbers
    with pytest.raises(ValueError, match="do not fit"):
        ResumableSampler(size, rank=rank, world_size=world_size)
