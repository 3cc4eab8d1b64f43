"""The truth benchmark, shortened: machines with habits that the cost model does not know, measured by the profiler's own experiments, planned for and run."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from benchmarks.hidden_machine import CPU, GPU, LINK_IN, Job, play, random_machine
from benchmarks.hidden_rehearsal import profiled
from benchmarks.truth import CARD_BYTES, Case, Row, apart, figures, judge
from twinpilots.model.dummy import dummy_spec


def test_passes_on_hidden_machines_take_what_is_predicted_and_more_exactly_so_after_tracking() -> None:
    spec = dummy_spec("smollm2-135m")
    spec = replace(spec, layers=spec.layers[:8])
    rows = []
    for number in (0, 1):
        machine = random_machine(7, number)
        profile = profiled(machine, spec, CARD_BYTES, 7, "quick")
        assert profile.link is not None
        assert profile.link.up_bytes_per_s == pytest.approx(machine.up, rel=0.15)  # packets of 32 MiB, and the weather
        assert profile.link.handoff_s == pytest.approx(machine.handoff_s, rel=0.15)
        rows += judge(machine, Case(machine=machine.name, model=spec.name, num_seqs=8, input_len=100, memory_frac=0.3, policy="hetegen"), spec, profile, 7)
    found = figures(rows)
    assert found["offline"][0] < 0.08
    assert found["after 50 passes"][0] < 0.03
    assert found["after 50 passes"][0] < found["offline, decode"][0]


def test_a_hidden_machine_deals_its_memory_to_all_who_ask() -> None:
    """Two readers who together ask for half as much again as there is; then one is done."""
    machine = replace(random_machine(7, 0), dram=10e9, crowding=0.0, weather=0.0, link_noise=0.0)
    quiet = replace(machine.cpu, noise=0.0, gap_s=0.0, wake_s=0.0)
    machine = replace(machine, cpu=quiet, gpu=quiet)
    jobs = [Job(CPU, 1.0, 9e9), Job(LINK_IN, 1.0, 6e9), Job(GPU, 0.5, 0.0, waits=(1,))]
    play(machine, jobs, 1, random.Random(0))
    # 5 GB/s each: after 1.2 s the link is done, and 3 GB are left to the CPU at its own 9 GB/s
    assert jobs[1].end_s == pytest.approx(1.2)
    assert jobs[0].end_s == pytest.approx(1.2 + 3 / 9)
    assert jobs[2].start_s >= 1.2 + 0.7 * machine.queue_handoff_s


def test_an_error_is_told_apart_from_the_spread_of_like_passes() -> None:
    """Passes of 16 sequences are predicted a tenth too quick in the middle, those of 8 right, and one of the first took twice as long."""
    case = Case(machine="m", model="m", num_seqs=16, input_len=1, memory_frac=0.5)
    row = Row(case=case, phase="decode", bound_by="cpu", predicted_s=1.0, true_s=1.0, errors=(-0.1, -0.1, -0.55, 0.0), tracked_errors=(), likeness=(0, 0, 0, 1))
    typical, spread = apart(row)
    assert typical == pytest.approx([-0.1, -0.1, -0.1, 0.0])
    assert spread == pytest.approx([0.0, 0.0, -0.5, 0.0])
    found = figures([row])
    assert found["offline"][0] == pytest.approx(0.1), "the error of single passes stays what it is"
    assert found["offline, the typical pass of each kind"][1] == pytest.approx(0.1)
    assert found["spread of like passes"][1] == pytest.approx(0.35)
