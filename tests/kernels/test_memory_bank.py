"""The ring buffer: what it holds after any sequence of batches."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import MemoryBank


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 7), st.lists(st.integers(0, 16), max_size=6))
def test_it_holds_the_last_rows_of_any_sequence_of_batches(size, batches):
    bank, written = MemoryBank(size, 2), []
    for count in batches:
        ids = torch.arange(len(written), len(written) + count)
        bank.enqueue(torch.stack([ids, -ids], 1).float(), ids)
        written += ids.tolist()
    assert sorted(bank.ids.tolist()) == written[-size:]
    assert len(bank) == min(size, len(written))
    assert torch.equal(bank.features, torch.stack([bank.ids, -bank.ids], 1).float())
    assert (bank.buffer[len(bank) :] == 0).all() and (bank.id_buffer[len(bank) :] == -1).all()


def test_rows_are_detached_copies_in_its_dtype():
    bank = MemoryBank(4, 2, dtype=torch.float16)
    rows = torch.ones(2, 2, requires_grad=True)
    bank.enqueue(rows)
    assert bank.features.dtype == torch.float16 and not bank.features.requires_grad
    assert bank.ids.tolist() == [-1, -1]


@pytest.mark.parametrize(
    "rows, ids", [(torch.ones(2, 3), None), (torch.ones(2), None), (torch.ones(2, 2), torch.ones(3).long())]
)
def test_other_shapes_are_refused(rows, ids):
    with pytest.raises(ValueError, match="must be"):
        MemoryBank(4, 2).enqueue(rows, ids)
