"""Where a W&B run goes: the config's word, else W&B's own variables, else ours.

Apart from the tracker, because the config that runs is made with it, and with that whatever is compiled."""

from __future__ import annotations

import os
from typing import Any

PROJECT = "moeexp"
WANDB_VARIABLES = {
    "project": "WANDB_PROJECT", "entity": "WANDB_ENTITY", "group": "WANDB_RUN_GROUP", "tags": "WANDB_TAGS",
}  # fmt: skip


def settled(settings: dict[str, Any]) -> dict[str, Any]:
    """With what the config leaves open of a W&B run's place: W&B's own variables, else ours."""
    own = {key: os.environ.get(name) or None for key, name in WANDB_VARIABLES.items()}
    tags = [tag.strip() for tag in (own["tags"] or "").split(",") if tag.strip()]
    return settings | {
        "project": settings["project"] or own["project"] or PROJECT,
        "entity": settings["entity"] or own["entity"],
        "group": settings["group"] or own["group"],
        "tags": tags if settings["tags"] is None else settings["tags"],
    }
