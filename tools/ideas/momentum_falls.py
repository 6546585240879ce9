"""Idea: Muon's momentum falls again as the run ends. An --idea of `python -m tools.explore`.

A long memory of gradients averages their noise, which low rates do as well; towards the end a
shorter one follows the loss more closely. Over the last TAIL of a run momentum goes from
MUON_MOMENTUM to LAST, as in modded-nanogpt's records of 2025.
"""

TAIL = 0.15  # of the run
LAST = 0.85


def install(script) -> None:
    """Changes train_gpt.py's schedule."""
    inner = script.schedule_at

    def schedule_at(settings, step: int, seconds: float):
        now = inner(settings, step, seconds)
        part = min(1.0, (1 - now.progress) / TAIL)
        return now._replace(momentum=min(now.momentum, LAST + (now.momentum - LAST) * part))

    script.schedule_at = schedule_at
