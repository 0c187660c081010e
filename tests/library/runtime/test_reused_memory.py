"""Reused memory: which piece serves which request, and never more than was in use at one time."""

import torch

from nntk_dist.runtime.reused_memory import ReusedMemory


def empty(memory, *shape, dtype=torch.float32):
    return memory.empty(shape, dtype=dtype, device="cpu")


def shares(one, other):
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def test_the_smallest_piece_that_is_large_enough_is_taken():
    memory = ReusedMemory()
    large, small = empty(memory, 4, 6), empty(memory, 2, 3)
    memory.give_back([large, small])
    again = empty(memory, 5)
    assert again.shape == (5,)
    assert shares(again, small)
    assert shares(empty(memory, 7), large)
    assert len(memory) == 0


def test_a_piece_serves_any_shape_and_type_up_to_its_whole_size_also_after_a_smaller_one():
    memory = ReusedMemory()
    whole = empty(memory, 4, 6)
    memory.give_back([whole])
    edge = empty(memory, 4, 2)
    memory.give_back([edge])
    other = empty(memory, 12, dtype=torch.float64)
    assert (other.dtype, other.shape) == (torch.float64, (12,))
    assert shares(other, whole)


def test_it_holds_no_more_than_was_in_use_at_once():
    memory = ReusedMemory()
    one, two = empty(memory, 4, 6), empty(memory, 4, 6)
    memory.give_back([one, two])
    assert len(memory) == 2
    larger = empty(memory, 4, 7)  # both are released
    assert len(memory) == 0
    assert not shares(larger, one)
    assert not shares(larger, two)


def test_memory_is_let_go():
    memory = ReusedMemory()
    memory.give_back([empty(memory, 3)])
    memory.clear()
    assert len(memory) == 0
