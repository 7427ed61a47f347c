"""Credits in reinforcement learning: what turns token weights into training signals, free of any trainer."""

from __future__ import annotations

from flowgraph.rl.monitor import entropy_overlap, monitor
from flowgraph.rl.shaping import shape_advantages

__all__ = ["entropy_overlap", "monitor", "shape_advantages"]
