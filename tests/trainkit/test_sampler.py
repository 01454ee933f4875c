import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainkit import distributed
from trainkit.errors import InputError
from trainkit.sampler import BalancedSampler, ResumableSampler, ShardSampler


def epochs(world_size: int, make) -> list[list]:
    """What the sampler of every rank gives."""
    batches = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "world_size", lambda: world_size)
        for rank in range(world_size):
            patch.setattr(distributed, "rank", lambda rank=rank: rank)
            sampler = make()
            batches.append(list(sampler))
            assert len(batches[-1]) == sampler.steps_per_epoch == len(sampler)
    return batches


@given(length=st.integers(1, 40), batch_size=st.integers(1, 5), world_size=st.integers(1, 4))
def test_ranks_cover_an_epoch_together(length, batch_size, world_size):
    ranks = epochs(world_size, lambda: ResumableSampler(length, batch_size, seed=1))
    assert {len(batch) for rank in ranks for batch in rank} == {batch_size}
    indices = [index for rank in ranks for batch in rank for _, index in batch]
    size = batch_size * world_size
    assert len(set(indices)) == (length // size * size or length)
    assert length < size or len(set(indices)) == len(indices)


def test_epochs_and_seeds_differ_and_repeat():
    def order(seed, epoch):
        sampler = ResumableSampler(50, 5, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 3) == order(0, 3)
    assert all(key[0] == 3 for batch in order(0, 3) for key in batch)
    plain = [[index for batch in order(*place) for _, index in batch] for place in ((0, 0), (0, 1), (1, 0))]
    assert plain[0] != plain[1] != plain[2] != plain[0]


def test_resume_goes_on_after_the_last_batch_that_was_trained_on():
    sampler = ResumableSampler(20, 3, seed=2)
    sampler.set_epoch(4)
    batches = list(sampler)  # fetched ahead, as workers do
    sampler.advance()
    sampler.advance(2)
    resumed = ResumableSampler(20, 3, seed=2)
    resumed.load_state_dict(sampler.state_dict())
    resumed.set_epoch(4)
    assert list(resumed) == batches[3:] and len(resumed) == 3
    resumed.set_epoch(5)
    assert len(list(resumed)) == 6
    resumed.advance(6)
    resumed.set_epoch(5)
    assert list(resumed) == []  # trained to its end, it stays there


def test_a_place_in_another_order_and_an_empty_set_are_refused():
    sampler = ResumableSampler(length=10, batch_size=2, seed=7)
    for name in ("length", "batch_size", "seed", "world_size"):
        with pytest.raises(InputError, match=f"its {name.replace('_', ' ')} was 11"):
            sampler.load_state_dict(sampler.state_dict() | {name: 11})
    with pytest.raises(InputError, match="empty"):
        ResumableSampler(0, 1, seed=0)


@given(
    first=st.integers(1, 40), second=st.integers(1, 40), share=st.floats(0.05, 0.9), batch_size=st.integers(1, 6),
    world_size=st.integers(1, 3),
)  # fmt: skip
def test_every_batch_of_two_data_sets_holds_their_shares(first, second, share, batch_size, world_size):
    def sampler():
        return BalancedSampler((first, second), batch_size, share=share, seed=3)

    exact = sampler().others / sampler().length
    batches = [batch for rank in epochs(world_size, sampler) for batch in rank]
    if first >= batch_size * world_size:
        assert all(abs(sum(index >= first for _, index in batch) - exact * batch_size) < 2 for batch in batches)
    assert all(0 <= index < first + second for batch in batches for _, index in batch)


def test_the_second_data_set_is_gone_through_before_any_of_it_comes_again():
    sampler = BalancedSampler((30, 25), 5, share=0.25, seed=0)
    assert sampler.others == 10 and sampler.steps_per_epoch == 8
    seen = []
    for epoch in range(5):
        sampler.set_epoch(epoch)
        indices = [index for batch in sampler for _, index in batch]
        assert sorted(index for index in indices if index < 30) == list(range(30))
        seen += [index - 30 for index in indices if index >= 30]
    assert sorted(seen[:25]) == sorted(seen[25:]) == list(range(25)) and seen[:25] != seen[25:]


def test_a_balanced_order_is_resumed_within_an_epoch_and_only_with_its_own_share():
    sampler = BalancedSampler((30, 25), 5, share=0.25, seed=0)
    whole = list(sampler)
    sampler.advance(3)
    again = BalancedSampler((30, 25), 5, share=0.25, seed=0)
    again.load_state_dict(sampler.state_dict())
    assert list(again) == whole[3:]
    with pytest.raises(InputError, match="length was 40, now it is 60"):
        BalancedSampler((30, 25), 5, share=0.5, seed=0).load_state_dict(sampler.state_dict())


@given(st.lists(st.integers(0, 30), min_size=1, max_size=6), st.integers(1, 5), st.integers(1, 4), st.integers(1, 20))
def test_ranks_share_files_without_overlap_and_read_them_nearly_in_a_row(lengths, batch_size, world_size, buffer):
    size, length = batch_size * world_size, sum(lengths)
    if not length:
        return
    ranks = epochs(world_size, lambda: ShardSampler(lengths, batch_size, buffer=buffer, seed=1))
    shares = [[index for batch in rank for _, index in batch] for rank in ranks]
    indices = [index for share in shares for index in share]
    assert len(set(indices)) == (length // size * size or length)
    assert length < size or len(set(indices)) == len(indices)
    files = np.split(np.arange(length), np.cumsum(lengths)[:-1])
    row = np.concatenate([files[i] for i in np.random.default_rng((1, 0)).permutation(len(files))])
    count = max(length, size) // world_size
    for rank, share in enumerate(shares):
        turns = {index: place for place, index in enumerate(np.resize(row, count * world_size)[rank * count :][:count])}
        assert length < size or all(abs(turns[index] - place) < buffer for place, index in enumerate(share))


def test_shards_go_on_from_any_place_in_the_same_order():
    def sampler(**more):
        return ShardSampler([20, 9, 12], 3, **dict(buffer=8, seed=0) | more)

    whole, later = sampler(), sampler()
    order = list(whole)
    assert order != list(sampler(seed=1)) and order != [sorted(batch) for batch in order]
    whole.advance(5)
    later.load_state_dict(whole.state_dict())
    assert list(later) == order[5:]
    for change in (sampler(buffer=9), ShardSampler([20, 12, 9], 3, buffer=8, seed=0)):
        with pytest.raises(InputError, match="its (buffer|lengths) was"):
            change.load_state_dict(whole.state_dict())
    whole.set_epoch(1)
    assert [index for batch in whole for _, index in batch] != [index for batch in order for _, index in batch]
