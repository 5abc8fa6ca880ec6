"""A client's links: which of them are kept when one is found dead."""

from types import SimpleNamespace
from typing import Any, cast

from minigpt.client.pool import Pool
from minigpt.protocol.links import StageLink


class Link:
    """In the place of a link to stage 0."""

    def __init__(self) -> None:
        self.stale = False
        self.answers = True
        self.ended = False
        self.channel: Any = SimpleNamespace(abort=self._end, close=self._end)

    def _end(self) -> None:
        self.ended = True

    def usable(self) -> bool:
        return self.answers


def pooled(count: int) -> tuple[Pool, list[Link]]:
    """A pool with so many idle links."""
    links = [Link() for _ in range(count)]
    made = iter([*links, Link()])
    pool = Pool(lambda: cast(StageLink, next(made)), 8, 60.0)
    for link in [pool.take() for _ in links]:
        pool.give(link, whole=True)
    return pool, links


def test_a_link_that_does_not_answer_takes_all_idle_ones_along_and_a_fresh_one_is_given() -> None:
    pool, links = pooled(3)
    links[-1].answers = False
    assert cast(Any, pool.take()) not in links
    assert [link.ended for link in links] == [True, True, True]


def test_a_link_that_the_stage_has_ended_takes_none_along() -> None:
    pool, links = pooled(3)
    links[-1].stale = True
    assert cast(Any, pool.take()) not in links
    assert [link.ended for link in links] == [False, False, True]


def test_links_in_use_are_not_flushed() -> None:
    pool, links = pooled(3)
    used = pool.take()
    pool.flush()
    assert [link.ended for link in links] == [True, True, False]
    pool.give(used, whole=True)
    assert pool.take() is used
