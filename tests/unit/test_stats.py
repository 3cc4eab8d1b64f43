"""Promise: `stats()` has the documented keys, adds up, and compares predictions with the same passes they were made for."""

from __future__ import annotations

from twinpilots.runtime.stats import BusySeconds, BytesMoved, EngineStats, PassReport, WeightShares


def report(seconds: float, predicted_s: float | None, generated: int, **shares: float) -> PassReport:
    return PassReport(
        seconds=seconds, predicted_s=predicted_s, busy_s=BusySeconds(cpu=0.5, gpu=0.25, link=0.125), bytes=BytesMoved(link_weights=10, link_kv=1),
        weights=WeightShares(**{"resident": 2.0, "streamed": 1.0, "cpu": 1.0, **shares}), num_prompt_tokens=3, num_generated=generated,
        predicted_busy_s=BusySeconds(cpu=0.75, gpu=0.5, link=0.25) if predicted_s is not None else None,
    )  # fmt: skip


def test_sums_rates_and_keys() -> None:
    stats = EngineStats(policy="auto", device="emulated:demo", emulated=True, weights=WeightShares(resident=1, streamed=0, cpu=0))
    assert stats.as_dict(peak_gpu_bytes=0, peak_host_bytes=0)["weights_frac"] == {"resident": 1.0, "streamed": 0.0, "cpu": 0.0}
    stats.add(report(2.0, 1.0, 4))
    stats.add(report(2.0, 3.0, 4, streamed=0.0, cpu=2.0))
    stats.add(report(6.0, None, 100))
    stats.plan_changes += 1
    assert stats.as_dict(peak_gpu_bytes=7, peak_host_bytes=8, plan_bound=5.0) == {
        "policy": "auto", "device": "emulated:demo", "emulated": True, "tokens": {"prompt": 9, "generated": 108}, "seconds": 10.0,
        "tokens_per_s": {"measured": 2.0, "predicted": 2.0, "plan_bound": 5.0, "hardware_bound": None},
        "bytes": {"link_weights": 30, "link_kv": 3, "link_activations": 0, "disk": 0}, "busy_s": {"cpu": 1.5, "gpu": 0.75, "link": 0.375},
        "predicted_busy_s": {"cpu": 1.5, "gpu": 1.0, "link": 0.5},
        "peak_bytes": {"gpu": 7, "host": 8}, "weights_frac": {"resident": 0.5, "streamed": 2 / 12, "cpu": 4 / 12}, "plan_changes": 1,
        "prefix_cache": {"queried_tokens": 0, "hit_tokens": 0},
    }  # fmt: skip


def test_without_predictions_the_measured_rate_covers_everything() -> None:
    stats = EngineStats(policy="cpu", device="cpu", emulated=False, weights=WeightShares(resident=0, streamed=0, cpu=1))
    assert stats.as_dict(peak_gpu_bytes=0, peak_host_bytes=0)["tokens_per_s"]["measured"] is None
    stats.add(report(2.0, None, 4))
    rates = stats.as_dict(peak_gpu_bytes=0, peak_host_bytes=0)["tokens_per_s"]
    assert (rates["measured"], rates["predicted"]) == (2.0, None)
