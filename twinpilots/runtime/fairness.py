"""Who is next among the waiting, when several clients share one engine.

Owns `FairQueue`: the waiting sequences by client, and what each client has had so far. Knows nothing of pages, passes or of what a client is.

The rule is the virtual token counter of "Fairness in Serving Large Language Models" (Sheng et al., OSDI 2024): a client is charged for the prompt tokens that
are computed for it and, twice as much, for the tokens generated; the client with the lowest counter is next; and a client that begins to wait is lifted to
the least counter of those who wait already, so that nobody saves up for later. Two clients that wait all the time are then never further apart than a
constant, whatever they ask for (`tests/unit/test_fairness.py` states it). Beyond the paper, what newcomers are lifted to rises with every prompt token that
is computed, by its share for each who waits: else newcomers without end could all be put before one who had more earlier. A single client is served first
come, first served.

Within a client a lower priority value goes first. A sequence that lost its pages comes before all that never ran.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator

from twinpilots.request import Sequence

PROMPT_TOKEN, OUTPUT_TOKEN = 1, 2  # as the paper weighs them, after what the large providers ask for
MOST_GONE = 1024  # clients without a request whose counters are kept; of more, those that had least are forgotten
_Rank = tuple[bool, float, int]


class FairQueue:
    """A sequence `add`ed is waiting; `take` lets it run, `put_back` makes it wait again, `leave` is the end of it, wherever it is."""

    def __init__(self) -> None:
        self._lines: dict[str, dict[int, deque[Sequence]]] = {}  # by client and priority, each by arrival; no empty ones
        self._live: Counter[str] = Counter()  # sequences of a client that wait or run
        self._served: dict[str, float] = {}
        self._start = 0.0  # the counter of whoever begins to wait, at least
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Sequence]:
        """In the order in which they would be taken if each were charged for its prompt at once."""
        if len(self._lines) == 1:
            (only,) = self._lines.values()
            for priority in sorted(only):
                yield from only[priority]
            return
        promised: Counter[str] = Counter()
        lines = {client: [sequence for priority in sorted(line) for sequence in line[priority]] for client, line in self._lines.items()}
        places = dict.fromkeys(lines, 0)
        while places:
            client = min(places, key=lambda client: self._rank(client, lines[client][places[client]], promised))
            sequence = lines[client][places[client]]
            promised[client] += PROMPT_TOKEN * sequence.num_pending
            places[client] += 1
            if places[client] == len(lines[client]):
                del places[client]
            yield sequence

    # -- in and out ----------------------------------------------------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """A new sequence."""
        client = sequence.client
        if client not in self._lines:
            others = [self.served(other) for other in self._lines or self._live if other != client]
            self._start = max(self._start, min(others, default=0.0))
            self._served[client] = max(self.served(client), self._start)
        self._live[client] += 1
        self._insert(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """A sequence that was taken has lost its pages."""
        self._insert(sequence)

    def _insert(self, sequence: Sequence) -> None:
        line = self._lines.setdefault(sequence.client, {}).setdefault(sequence.priority, deque())
        position = len(line)
        while position and line[position - 1].arrival > sequence.arrival:
            position -= 1
        line.insert(position, sequence)
        self._count += 1

    def first(self, promised: Counter[str]) -> Sequence:
        """Whose turn it is. ``promised``: by client, what its running sequences will be charged for their prompts."""
        heads = {client: self._head(line) for client, line in self._lines.items()}
        return heads[min(heads, key=lambda client: self._rank(client, heads[client], promised))]

    @staticmethod
    def _head(line: dict[int, deque[Sequence]]) -> Sequence:
        return line[min(line)][0]

    def _rank(self, client: str, head: Sequence, promised: Counter[str]) -> _Rank:
        return head.num_seen == 0, self.served(client) + promised[client], head.arrival

    def take(self, sequence: Sequence) -> None:
        """It waits no longer."""
        line = self._lines[sequence.client]
        of_priority = line[sequence.priority]
        if of_priority[0] is sequence:
            of_priority.popleft()
        else:
            of_priority.remove(sequence)
        if not of_priority:
            del line[sequence.priority]
        if not line:
            del self._lines[sequence.client]
        self._count -= 1

    def leave(self, sequence: Sequence, *, waits: bool) -> None:
        """A sequence has ended, while it waited or ran."""
        if waits:
            self.take(sequence)
        self._live[sequence.client] -= 1
        if not self._live[sequence.client]:
            del self._live[sequence.client]
            self._forget()

    def _forget(self) -> None:
        if not self._live:  # whoever comes next competes with nobody
            self._served.clear()
            self._start = 0.0
            return
        gone = [client for client in self._served if client not in self._live]
        if len(gone) > MOST_GONE:
            for client in sorted(gone, key=self.served)[: len(gone) // 2]:
                del self._served[client]

    # -- what clients have had -----------------------------------------------------------------------------------------------------------

    def served(self, client: str) -> float:
        """The client's counter."""
        return self._served.get(client, 0.0)

    def charge(self, client: str, num_computed: int, num_generated: int) -> None:
        """A pass has computed tokens that the client's sequence brings for the first time, and generated others."""
        self._served[client] = self.served(client) + PROMPT_TOKEN * num_computed + (OUTPUT_TOKEN - PROMPT_TOKEN) * num_generated
        if self._lines:
            self._start += PROMPT_TOKEN * max(0, num_computed - num_generated) / len(self._lines)

    def by_turn(self, sequences: list[Sequence]) -> list[Sequence]:
        """Running sequences in the order in which their prompts go on: the client that has had least first."""
        if len(self._live) < 2 and not any(sequence.priority for sequence in sequences):
            return sequences
        return sorted(sequences, key=lambda sequence: (self.served(sequence.client), sequence.priority, sequence.arrival))

    def overtakes(self, waiting: Sequence, running: Sequence) -> bool:
        """Whether a waiting sequence should begin before a running one's prompt goes on: never another of the same client."""
        ours, theirs = (self.served(waiting.client), waiting.arrival), (self.served(running.client), running.arrival)
        return waiting.client != running.client and ours < theirs

    def check_integrity(self, num_running: int) -> None:
        """Lines are in order and counts are right. AssertionError states both sides."""
        waiting = 0
        for client, line in self._lines.items():
            for priority, sequences in line.items():
                arrivals = [sequence.arrival for sequence in sequences]
                if arrivals != sorted(arrivals) or not arrivals:
                    raise AssertionError(f"client {client!r} waits at priority {priority} in the order {arrivals}, not {sorted(arrivals)}")
                waiting += len(arrivals)
        if waiting != self._count or self._live.total() != waiting + num_running:
            raise AssertionError(f"{waiting} sequences wait and {num_running} run, the queue counts {self._count} waiting, {self._live.total()} in all")
