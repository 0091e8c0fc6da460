"""What a record may call itself: its states, its id, its times."""

from __future__ import annotations

import re

# lost: it said `running`, and its process is gone; see `moeexp.record.liveness`.
STATUSES = ("running", "ok", "incorrect", "failed", "timeout", "interrupted", "lost", "unsupported")
# Part of a file's name where a repetition replaces the record.
ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?(Z|[+-][0-9]{2}:[0-9]{2})")
