"""`SharedWeakSet` while several threads use it."""

from __future__ import annotations

import gc
import sys
import threading

from moba_flex.core.weak_set import SharedWeakSet


class Thing:
    pass


def test_it_holds_what_is_alive():
    things, kept = SharedWeakSet[Thing](), [Thing(), Thing()]
    for thing in (*kept, Thing(), kept[0]):
        things.add(thing)
    gc.collect()
    assert sorted(map(id, things.all())) == sorted(map(id, kept))


def test_it_may_be_read_while_other_threads_add():
    things, kept, n = SharedWeakSet[Thing](), [Thing() for _ in range(200)], 20
    before, errors = sys.getswitchinterval(), list[Exception]()

    def add(part: list[Thing]) -> None:
        for thing in part:
            things.add(thing)

    def read() -> None:
        try:
            while any(thread.is_alive() for thread in writers):
                things.all()
        except RuntimeError as error:
            errors.append(error)

    sys.setswitchinterval(1e-6)
    try:
        writers = [threading.Thread(target=add, args=(kept[i::n],)) for i in range(n)]
        reader = threading.Thread(target=read)
        for thread in (*writers, reader):
            thread.start()
        for thread in (*writers, reader):
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not errors and len(things.all()) == len(kept)


def test_a_thread_waits_for_one_that_reads():
    """What the test above finds by chance."""
    things, thing = SharedWeakSet[Thing](), Thing()
    thread = threading.Thread(target=things.add, args=(thing,))
    with things._lock:
        thread.start()
        thread.join(0.05)
        assert thread.is_alive() and not len(things._objects)
    thread.join()
    assert things.all() == [thing]
