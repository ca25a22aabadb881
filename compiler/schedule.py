"""Schedule: the order in which the tasks of a segment take their strips."""

from __future__ import annotations

from collections.abc import Iterator

from weft.compiler.lower import Task
from weft.compiler.memory_plan import Segment


def strips(segment: Segment) -> Iterator[tuple[Task, int, int]]:
    """(task, first row, last row + 1), each task in turn as soon as its inputs exist and its window has room.

    Rounds over the tasks in data-flow order; a strip uses only what earlier rounds produced, so that a unit
    never waits for what another unit has only just been given, and a producer runs ahead by as many strips
    as its ring allows. Raises AssertionError if no task can go on: the memory plan made a window too small.
    """
    done = dict.fromkeys(segment.tasks, 0)
    while any(done[task] < task.rows for task in segment.tasks):
        before = dict(done)
        progress = False
        for task in segment.tasks:
            first = done[task]
            last = min(first + segment.strip[task], task.rows)
            if (
                first < task.rows
                and _inputs_ready(segment, before, task, first, last)
                and _room(segment, done, task, last)
            ):
                yield task, first, last
                done[task] = last
                progress = True
        assert progress, f"no task of segment {[task.name for task in segment.tasks]} can go on"


def _inputs_ready(segment: Segment, done: dict[Task, int], task: Task, first: int, last: int) -> bool:
    for source in task.sources:
        needed = source.rows(first, last)[1]
        for producer in segment.tasks:
            for target in producer.targets:
                if target.buffer is source.buffer and done[producer] * target.factor < needed:
                    return False
    return True


def _room(segment: Segment, done: dict[Task, int], task: Task, last: int) -> bool:
    for target in task.targets:
        storage = segment.storage[target.buffer]
        oldest = last * target.factor - storage.rows  # rows below this are overwritten
        if storage.whole or oldest <= 0:
            continue
        for reader in segment.tasks:
            for source in reader.sources:
                if (
                    source.buffer is target.buffer
                    and done[reader] < reader.rows
                    and source.rows(done[reader], done[reader] + 1)[0] < oldest
                ):
                    return False
    return True
