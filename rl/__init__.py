"""Credits in reinforcement learning: what turns token weights into training signals, free of any trainer.

Scorer, FlowConfig      rollouts -> token weights, in any layout
Crediting               one training step: rollouts and advantages -> a factor per token
shape_advantages        weights into advantages
BASELINES               rival signals under the same recipe; formulas of those that attribute the answer: `attributions`
Monitor, monitor        what the credits of a step look like
"""

from __future__ import annotations

from flowgraph.rl.baselines import BASELINES, Baseline, HeadGroups, calibrate
from flowgraph.rl.config import FlowConfig
from flowgraph.rl.crediting import Crediting, Factors
from flowgraph.rl.monitor import Monitor, entropy_overlap, monitor
from flowgraph.rl.samples import Sample, samples_of
from flowgraph.rl.scorer import Scored, Scorer
from flowgraph.rl.shaping import shape_advantages

__all__ = [
    "BASELINES",
    "Baseline",
    "Crediting",
    "Factors",
    "FlowConfig",
    "HeadGroups",
    "Monitor",
    "Sample",
    "Scored",
    "Scorer",
    "calibrate",
    "entropy_overlap",
    "monitor",
    "samples_of",
    "shape_advantages",
]
