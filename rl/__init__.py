"""Credits in reinforcement learning: what turns token weights into training signals, free of any trainer."""

from __future__ import annotations

from flowgraph.rl.shaping import shape_advantages

__all__ = ["shape_advantages"]
