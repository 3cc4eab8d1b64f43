"""What it is worth that a sequence's KV changes tiers: seconds gained against seconds of copying.

Owns `MovePrices`. Pure: rates come from a profile, pass times from the simulator. Knows nothing of queues or pages.

On the GPU a sequence saves in every pass what its attention costs on the host. Who must make room on the GPU may go to the host, where it costs that much in
every pass, or give up its KV: then it is computed anew, and until then every pass yields one token less. What a token is worth is a pass's time by its tokens.
"""

from __future__ import annotations

from math import ceil, log2

from twinpilots.hardware.profile import HardwareProfile
from twinpilots.model.spec import ModelSpec
from twinpilots.plan.cost import ACTIVATION_BYTES, attention_s, rope_append_bytes, staged_kv_bytes
from twinpilots.plan.estimate import PassEstimator
from twinpilots.plan.load import PassLoad, SeqClass, decode_load, prefill_load
from twinpilots.plan.plan import BucketPlan, Plan
from twinpilots.plan.tasks import PassShape

STEPS_PER_OCTAVE = 4  # contexts are told apart to a fifth: a price is asked for in every pass
MARGIN = 1.2  # a move gains at least so many times what it costs
QUESTION_S = 20e-3  # what two passes and their task lists take to be simulated, about: a question that can bring no more is answered with no
HANDOFFS = 4  # of a layer, at most


class MovePrices:
    """Prices under one plan and profile. ``num_gpu`` and ``num_host``: decoding sequences by where their KV lies, the one in question included;
    ``context``: their tokens, on average; ``passes``: how long the sequence will go on."""

    def __init__(self, spec: ModelSpec, plan: Plan, profile: HardwareProfile) -> None:
        assert profile.link is not None
        self.spec, self.plan, self.profile, self._link = spec, plan, profile, profile.link
        self._estimators: dict[tuple[int, PassShape], PassEstimator] = {}
        self._steps: dict[tuple[int, int, int], float] = {}

    def copy_s(self, num_tokens: int, *, up: bool) -> float:
        """Moving a sequence's whole pages, of all layers."""
        pages = ceil(num_tokens / self.plan.page_size)
        num_bytes = self.spec.kv_page_bytes(self.plan.kv_dtype, self.plan.page_size) * self.spec.num_layers * pages
        return self._link.packet_s + num_bytes / (self._link.up_bytes_per_s if up else self._link.down_bytes_per_s)

    def pays_to_gpu(self, num_tokens: int, passes: int, *, num_gpu: int, num_host: int, context: int) -> bool:
        """Whether one of the host's sequences, of ``num_tokens`` tokens, should go to the GPU. Asked in every pass while there is room: near the end of a batch
        nothing is simulated for a gain that would not pay for it."""
        if self._most_gain_s(max(num_tokens, context), num_host) * passes <= MARGIN * self.copy_s(num_tokens, up=True) + QUESTION_S:
            return False
        now_s = self.step_s(num_gpu, num_host, context)
        gain_s = (now_s - self.step_s(num_gpu + 1, num_host - 1, context)) * passes
        return gain_s > MARGIN * (self.copy_s(num_tokens, up=True) + now_s / (num_gpu + num_host))  # it sits one pass out

    def _most_gain_s(self, num_tokens: int, num_host: int) -> float:
        """What a pass can be shorter for it, at most: its attention on the host, slowed down by everybody else, and what crosses for it; the last one takes
        the hand-offs along."""
        spec, link, cpu, alone = self.spec, self._link, self.profile.cpu, SeqClass(1, 1, num_tokens + 1)
        windows, kv_dtype = [layer.window for layer in spec.layers], self.plan.kv_dtype
        each_s = {window: attention_s(spec, alone, window, kv_dtype, cpu) for window in set(windows)}
        beside_s = rope_append_bytes(spec, 1, kv_dtype) / cpu.elementwise_bytes_per_s
        gain_s = (sum(each_s[window] for window in windows) + beside_s * len(windows)) * cpu.copy_slowdown * cpu.peer_slowdown
        gain_s += ACTIVATION_BYTES * 2 * (spec.q_size + spec.kv_size) / min(link.up_bytes_per_s, link.down_bytes_per_s) * len(windows)
        if any(bucket.host_attention == "gpu" for bucket in self.plan.buckets):
            staged_s = staged_kv_bytes(spec, alone, self.plan.page_size, kv_dtype) / link.up_bytes_per_s
            gain_s += (staged_s + 2 * link.packet_s + link.load_kv_s + link.store_kv_s) * len(windows) * link.peer_slowdown
        if num_host == 1:
            gain_s += (cpu.task_s + link.copy_s + link.handoff_s) * HANDOFFS * len(windows)
        return gain_s

    def pays_to_host(self, num_tokens: int, passes: int, *, num_gpu: int, num_host: int, context: int) -> bool:
        """Whether one of the GPU's sequences should go to the host, instead of giving up its KV."""
        without_s = self.step_s(num_gpu - 1, num_host, context)
        slowed_s = (self.step_s(num_gpu - 1, num_host + 1, context) - without_s) * passes
        others = num_gpu + num_host - 1
        lost_s = self._recompute_s(num_tokens) + (without_s / others * passes if others else 0.0)
        return lost_s > MARGIN * (self.copy_s(num_tokens, up=False) + slowed_s)

    def step_s(self, num_gpu: int, num_host: int, context: int) -> float:
        """A decoding pass."""
        if num_gpu + num_host == 0:
            return 0.0
        step = round(log2(max(1, context)) * STEPS_PER_OCTAVE)
        key = (num_gpu, num_host, step)
        if key not in self._steps:
            bucket = self.plan.bucket_for("decode", num_gpu + num_host)
            tokens = min(round(2 ** (step / STEPS_PER_OCTAVE)), self.plan.max_model_len - 1)
            self._steps[key] = self._seconds(bucket, decode_load(num_gpu, num_host, tokens, bucket))
        return self._steps[key]

    def _recompute_s(self, num_tokens: int) -> float:
        """What reading the sequence's tokens anew adds to passes that would run anyway."""
        chunk = min(num_tokens, self.plan.max_pass_tokens)
        bucket = self.plan.bucket_for("prefill", chunk)
        alone_s = self._seconds(bucket, prefill_load(1, 0, chunk, 0, bucket))
        return max(0.0, alone_s - self.step_s(1, 0, num_tokens)) * ceil(num_tokens / chunk)

    def _seconds(self, bucket: BucketPlan, load: PassLoad) -> float:
        key = (id(bucket), load.shape)  # the plan keeps its buckets alive
        if key not in self._estimators:
            self._estimators[key] = PassEstimator(self.spec, self.plan, bucket, self.profile, load.shape)
        return self._estimators[key].timing(load).seconds
