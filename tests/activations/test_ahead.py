"""Blocks made one ahead: the same blocks, errors where they are asked for, none behind the last."""

import threading

import pytest

from sparse_jax.activations import Ahead
from sparse_jax.errors import InputError


class Numbers:
    """Blocks that are their numbers; the sixth is damaged."""

    tokens_per_block = 3

    def __init__(self):
        self.made, self.threads = [], set()

    def __getitem__(self, index):
        self.made.append(index)
        self.threads.add(threading.current_thread().name)
        if index == 6:
            raise InputError("block 6 is damaged")
        return index


def test_blocks_come_in_any_order_and_each_is_made_once_where_they_follow_each_other():
    blocks = Numbers()
    with Ahead(blocks, last=5) as ahead:
        assert [ahead[i] for i in (0, 1, 2, 3)] == [0, 1, 2, 3]
        assert [ahead[i] for i in (1, 5, 0)] == [1, 5, 0]
        assert ahead.tokens_per_block == 3
    assert blocks.made[:5] == [0, 1, 2, 3, 4]
    assert max(blocks.made) == 5
    assert all(name.startswith("blocks") for name in blocks.threads)


def test_the_next_block_is_made_while_one_is_used():
    begun, go_on = threading.Event(), threading.Event()

    class Slow(Numbers):
        def __getitem__(self, index):
            if index == 1:
                begun.set()
                assert go_on.wait(20)
            return index

    with Ahead(Slow(), last=9) as ahead:
        assert ahead[0] == 0
        assert begun.wait(20)  # nobody has asked for it
        go_on.set()
        assert ahead[1] == 1


def test_an_error_comes_when_its_block_is_asked_for_and_no_earlier():
    with Ahead(Numbers(), last=9) as ahead:
        assert ahead[5] == 5
        with pytest.raises(InputError, match="block 6"):
            ahead[6]
        assert ahead[7] == 7
