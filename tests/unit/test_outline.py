"""Outlines of task lists: the short way to one leads to the same as the long one, so that prices are those of what runs."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings

from tests.random_plans import Case, cases
from twinpilots.plan.outline import Outline, outline, outline_of
from twinpilots.plan.schedule import expand
from twinpilots.plan.tasks import Task


def _plain(task: Task) -> Task:
    return replace(task, waits=())


@settings(max_examples=80, deadline=None)
@given(cases(max_layers=3))
def test_an_outline_is_that_of_the_tasks_that_run(case: Case) -> None:
    schedule = expand(case.spec, case.plan, case.bucket, case.shape)
    long, short = outline_of(schedule, case.spec), outline(case.spec, case.plan, case.bucket, case.shape)
    assert [_plain(task) for task in short.examples] == [_plain(task) for task in long.examples]
    assert _numbers(short) == _numbers(long)
    assert (short.packets, short.shape, short.num_tasks) == (schedule.packets, schedule.shape, len(schedule.tasks))
    assert sorted(index for order in short.order for index in order) == list(range(short.num_tasks))


def _numbers(found: Outline) -> tuple[object, ...]:
    return found.queues, found.layers, found.waits, found.costs, found.order
