"""What is made ahead of its use: in order, meanwhile, no further than one, errors in their place."""

import threading

import pytest

from sinkstudy.model.lvlm import ahead


def test_the_next_item_is_made_while_one_is_used():
    made = [threading.Event() for _ in range(4)]

    def items():
        for number, event in enumerate(made):
            event.set()
            yield number

    seen = []
    for item in ahead(items()):
        seen.append(item)
        if item + 1 < len(made):
            assert made[item + 1].wait(10)  # nobody has asked for it yet
        assert not any(event.is_set() for event in made[item + 2 :])
    assert seen == [0, 1, 2, 3]


def test_an_error_comes_where_its_item_would():
    def items():
        yield 1
        raise ValueError("the second")

    several = ahead(items())
    assert next(several) == 1
    with pytest.raises(ValueError, match="the second"):
        next(several)


def test_whoever_stops_leaves_no_thread_behind():
    before = threading.active_count()
    several = ahead(iter(range(100)))
    assert [next(several), next(several)] == [0, 1]
    several.close()
    assert threading.active_count() == before
    assert list(ahead([])) == []
