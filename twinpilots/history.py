"""What runs have taught, kept beside the profile: stored at the end of a run, aged and taken up at the next one's start.

Owns the files (one per profile: hardware, versions, device and model widths) and how records age. Knows nothing of what the records mean (`stats`).
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from hashlib import sha256
from pathlib import Path

from twinpilots.hardware.profile import HardwareProfile
from twinpilots.hardware.store import cache_dir
from twinpilots.stats.tracker import Tracker

logger = logging.getLogger(__name__)
HISTORY_SCHEMA = 1
HALF_LIFE_S = 7 * 86400.0  # of a record's weight: what a machine did a week ago counts half


def history_path(profile: HardwareProfile) -> Path:
    """One file per offline profile: records are ratios to it, so a new measurement starts a new history."""
    return cache_dir() / "history" / f"{sha256(profile.to_json().encode()).hexdigest()[:24]}.json"


def store(tracker: Tracker, now_s: float | None = None) -> None:
    """Writes what ``tracker`` has learned, atomically. A cache that cannot be written is a warning."""
    if not tracker.num_passes:
        return
    path = history_path(tracker.offline)
    document = {"schema": HISTORY_SCHEMA, "saved_s": time.time() if now_s is None else now_s, "profile": tracker.offline.name, "records": tracker.as_dict()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            json.dump(document, file)
        os.replace(file.name, path)
    except OSError as error:
        logger.warning("what this run has learned of the machine could not be stored in %s: %s", path, error)


def recall(tracker: Tracker, now_s: float | None = None) -> bool:
    """Starts ``tracker`` from the stored history of its profile, older records counting less; whether there was one. A damaged file is a warning."""
    path = history_path(tracker.offline)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["schema"] != HISTORY_SCHEMA:
            raise ValueError(f"schema is {document['schema']!r}, this version reads {HISTORY_SCHEMA}")
        age_s = max(0.0, (time.time() if now_s is None else now_s) - float(document["saved_s"]))
        tracker.recall(document["records"], 0.5 ** (age_s / HALF_LIFE_S))
    except FileNotFoundError:
        return False
    except (OSError, ValueError, TypeError, KeyError) as error:
        logger.warning("the history in %s is damaged and ignored (%s); delete it, or run `twinpilots profile --forget`", path, error)
        return False
    return True


def forget(profile: HardwareProfile | None = None) -> int:
    """Removes the history of one profile, or of all (None); how many files went."""
    paths = [history_path(profile)] if profile is not None else list((cache_dir() / "history").glob("*.json"))
    found = [path for path in paths if path.exists()]
    for path in found:
        path.unlink()
    return len(found)
