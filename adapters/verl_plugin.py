"""What verl loads at its start, by the entry-point group "verl.plugins": trainer modes with token credits.

    flowgraph_sync, flowgraph_colocate_async, flowgraph_separate_async      verl's own of that name, with `FlowMixin`

verl hides what goes wrong while it loads plugins and then knows no such mode; import this module by hand to see why.
"""

from __future__ import annotations

from verl.trainer.ppo.v1 import PPOTrainerColocateAsync, PPOTrainerSeparateAsync, PPOTrainerSync, register_trainer

from flowgraph.adapters.verl import FlowMixin


@register_trainer("flowgraph_sync")
class FlowTrainerSync(FlowMixin, PPOTrainerSync):
    """verl's synchronous trainer, with token credits."""

    plain_mode = "sync"


@register_trainer("flowgraph_colocate_async")
class FlowTrainerColocateAsync(FlowMixin, PPOTrainerColocateAsync):
    """verl's asynchronous trainer on shared devices, with token credits."""

    plain_mode = "colocate_async"


@register_trainer("flowgraph_separate_async")
class FlowTrainerSeparateAsync(FlowMixin, PPOTrainerSeparateAsync):
    """verl's asynchronous trainer on separate devices, with token credits."""

    plain_mode = "separate_async"
