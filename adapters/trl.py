"""Token credits in TRL: `FlowGRPOTrainer` is `GRPOTrainer` with one more argument, `flow=FlowConfig(...)`.

    TRL generates, rewards, makes advantages [B]          (untouched)
      -> scores: from the forward pass that TRL makes for old log-probabilities, where it makes one; else from one more
         pass of the responses with a non-zero advantage, without gradient
      -> advantages [B, C] = factors [B, C] * advantages  (flowgraph.rl.Crediting)
      -> TRL's own loss, which takes advantages of either shape

Nothing else of TRL is replaced: generation, rewards, the loss, its denominator and its clipping stay what they are.
A response that cannot be scored keeps weight 1 and is counted in the logs. docs/trainers/trl.md has the whole story.

Shapes: B responses, P prompt tokens (padded left), C completion tokens (padded right), T = P + C, N tokens of one
response with its prompt, without pads.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flowgraph.capture import Capture, evaluation_mode, recording, softmax_layers_of
from flowgraph.rl.baselines import BASELINES, NEED_HEADS
from flowgraph.rl.config import FlowConfig
from flowgraph.rl.crediting import Crediting, Factors
from flowgraph.rl.monitor import KEYS, entropy_overlap
from flowgraph.rl.samples import Sample, samples_of
from flowgraph.rl.scorer import Credits, SampleScore, Scored, Scorer, chunks, isolated, trace_samples
from flowgraph.tracer import Tracer

try:
    from trl.trainer.grpo_trainer import GRPOTrainer
except ImportError as error:
    raise ImportError('flowgraph.adapters.trl needs TRL: pip install "flowgraph-llm[trl]"') from error

if TYPE_CHECKING:
    from trl.trainer.grpo_trainer import GRPOTrainer as _Base
else:
    _Base = object

__all__ = ["FlowConfig", "FlowGRPOTrainer", "FlowMixin"]

_RATIO_OF_THE_SEQUENCE_IS_HARMLESS = ("cispo", "vespo")
"""Loss types whose gradient is advantage * d log p of each token even with one importance ratio per sequence."""


class FlowMixin(_Base):
    """Credits for a trainer of the GRPO family: `class Mine(FlowMixin, GRPOTrainer)`, then `Mine(..., flow=...)`.

    A subclass with a `compute_loss` or `_compute_loss` of its own is refused until it says
    `takes_token_advantages = True`: that its loss takes advantages [B, C] and that its gradient is theirs, token by
    token.

    Args:
        flow: a `FlowConfig`; default: `FlowConfig()`.

    Raises:
        ValueError: at construction, for settings under which credits would do nothing, or something else.
    """

    takes_token_advantages = False

    args: Any
    model: Any
    processing_class: Any

    def __init__(self, *args: Any, flow: FlowConfig | None = None, **kwargs: Any) -> None:
        if not isinstance(self, GRPOTrainer):
            raise TypeError(f"{type(self).__name__} is no GRPOTrainer; write class Mine(FlowMixin, GRPOTrainer)")
        self.flow = FlowConfig() if flow is None else flow
        self._flow_entropy: Tensor | None = None
        self._flow_tools: list[list[int]] | None = None
        self._flow_wanted = False
        self._flow_taken: _Taken | None = None
        self._flow_refreshed: int | None = None
        super().__init__(*args, **kwargs)
        self._refuse_what_would_do_nothing()
        self._flow_crediting = Crediting(self._flow_scorer(), self.flow)
        self._try_the_scorer()

    # --- what is refused ----------------------------------------------------------------------------------------------

    def _refuse_what_would_do_nothing(self) -> None:
        args = self.args
        if args.importance_sampling_level == "sequence" and args.loss_type not in _RATIO_OF_THE_SEQUENCE_IS_HARMLESS:
            raise ValueError(
                f'importance_sampling_level="sequence" with loss_type="{args.loss_type}" gives every token of a '
                "response the same gradient: credits would only scale whole responses by their mean weight (by 1 with "
                f'normalize=True). Use "token", or loss_type {" or ".join(_RATIO_OF_THE_SEQUENCE_IS_HARMLESS)}'
            )
        for name in ("compute_loss", "_compute_loss"):
            owner = next(c for c in type(self).__mro__ if c is not FlowMixin and name in vars(c))
            if not issubclass(GRPOTrainer, owner) and not self.takes_token_advantages:
                raise ValueError(
                    f"{owner.__name__} has a {name} of its own. If that takes advantages [B, C] and its gradient "
                    "is advantage times d log p of each token, set takes_token_advantages = True on the class"
                )
        if self._is_vlm:
            raise ValueError(
                "processing_class is the processor of a vision-language model, whose images credits do not trace. "
                "For training on text alone, pass its tokenizer: processing_class=processor.tokenizer"
            )
        if self.flow.score in NEED_HEADS and self.flow.heads is None and self.accelerator.num_processes > 1:
            raise ValueError(
                f'score="{self.flow.score}" on {self.accelerator.num_processes} processes needs FlowConfig(heads=...), '
                "from `flowgraph.rl.calibrate`: each process would find heads of its own"
            )
        self._refuse_what_is_sharded()

    def _refuse_what_is_sharded(self) -> None:
        sharding, flow = self._sharding(), self.flow
        if sharding is None:
            return
        advice = "Pass FlowConfig(scorer=...), a copy of the policy or a smaller model with the same tokenizer"
        if flow.scorer is None and sharding != "FSDP2":
            raise ValueError(f"the policy is sharded by {sharding}, which credits cannot read. {advice}")
        if flow.scorer is None and flow.score in BASELINES:
            raise ValueError(f"the policy is sharded by {sharding}, and score={flow.score!r} needs it whole. {advice}")
        if flow.refresh_steps and sharding != "FSDP2":
            raise ValueError(f"refresh_steps cannot gather weights that {sharding} has sharded; set it to 0")
        if flow.refresh_steps and _has_adapters(self.model):
            raise ValueError(
                "refresh_steps cannot merge adapters that are sharded; set it to 0, or train whole weights"
            )

    def _sharding(self) -> str | None:
        """What keeps parts of each weight on each process: "FSDP1", "FSDP2", "DeepSpeed ZeRO-3" or None."""
        state = self.accelerator.state
        if self.is_fsdp_enabled:
            return f"FSDP{state.fsdp_plugin.fsdp_version}"
        deepspeed = getattr(state, "deepspeed_plugin", None)
        return "DeepSpeed ZeRO-3" if deepspeed is not None and deepspeed.zero_stage == 3 else None

    def _flow_scorer(self) -> Credits:
        scorer = self.flow.scorer
        if isinstance(scorer, Credits):
            return scorer
        if scorer is None:
            return Scorer(self.accelerator.unwrap_model(self.model), self.processing_class, self.flow)
        if getattr(scorer, "hf_device_map", None) is None:
            scorer.to(self.accelerator.device)
        return Scorer(scorer, self.processing_class, self.flow)

    def _try_the_scorer(self) -> None:
        """`Scorer.check`, and whether the tokenizer fits the model."""
        scorer = self._flow_crediting.scorer
        if not isinstance(scorer, Scorer):
            return  # it runs somewhere else, and has been asked by its maker
        words = scorer.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
        if self.flow.scorer is not None and words < len(self.processing_class):
            raise ValueError(
                f"scorer has {words} token embeddings, the tokenizer {len(self.processing_class)} tokens: it must be a "
                "model with the tokenizer of the policy"
            )
        try:
            if self._sharding() and self.flow.scorer is None and not self.accelerator.is_main_process:
                # Weights may not have come from the main process yet.
                softmax_layers_of(scorer.model, torch.zeros(1, 6).long())
            else:
                scorer.check()
        except ValueError as error:
            raise ValueError(f"flow: {'model' if self.flow.scorer is None else 'scorer'}: {error}") from error

    # --- the batch ----------------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's batch with advantages [B, C] in it. Evaluation, which takes no gradient, is left alone."""
        if not self.model.training:
            return super()._generate_and_score_completions(inputs)
        began = time.perf_counter()
        self._refresh_the_scorer()
        seconds = time.perf_counter() - began
        self._flow_wanted = self._reuses_a_pass()
        try:
            output = super()._generate_and_score_completions(inputs)
            taken = self._flow_taken
        finally:
            self._flow_wanted, self._flow_taken, self._flow_tools = False, None, None
        began = time.perf_counter()
        self._put_credits_into(output, taken)
        seconds += time.perf_counter() - began + (0 if taken is None else taken.seconds)
        mine = torch.tensor([seconds], device=self.accelerator.device)
        self._metrics["train"]["flow/seconds"].append(self.accelerator.gather(mine).max().item())
        return output

    def _put_credits_into(self, output: dict[str, Any], taken: _Taken | None) -> None:
        completion = output["completion_mask"].bool()
        trained = completion & output["tool_mask"].bool() if "tool_mask" in output else completion
        ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
        real = torch.cat([output["prompt_mask"].bool(), completion], dim=1)
        batch = self._samples(ids, real, completion.shape[1], trained)
        advantages = _by_sample(output["advantages"], completion, batch)
        scored = None
        fits = taken is not None and taken.fits(batch)
        together = self._sharding() is not None and self.flow.scorer is None
        if together:  # all of them or none: those that go on alone would wait for the others forever
            here = torch.tensor([float(fits)], device=completion.device)
            fits = bool(self.accelerator.gather(here).min() > 0)
        if taken is not None and fits:
            scored = Scored(batch, taken.found, self.flow)
        elif together:
            moved = [bool(torch.as_tensor(one).ne(0).any()) for one in advantages]
            scored = Scored(batch, self._score_together(batch, moved), self.flow)
        factors = self._flow_crediting.factors(
            [one.token_ids for one in batch],
            [one.response_mask for one in batch],
            advantages,
            step=self.state.global_step,
            trained_mask=[one.response_mask & ~one.tool_mask for one in batch],
            truncated=[one.truncated for one in batch],
            scored=scored,
        )
        device = completion.device
        per_token = output["advantages"] if output["advantages"].ndim == 2 else output["advantages"][:, None]
        gains = _to_layout(list(factors), batch, torch.ones(completion.shape)).to(per_token)
        output["advantages"] = torch.where(trained, gains * per_token, per_token)
        # [B, C], shuffled and split along by TRL
        output["flow_weights"] = _to_layout(factors.weights, batch, torch.ones(completion.shape)).to(device)
        output["flow_mask"] = _to_layout(factors.masks, batch, torch.zeros(completion.shape).bool()).to(device)
        self._log_shares(factors)
        self._log_means(factors.means)

    def _samples(self, ids: Tensor, real: Tensor, num_completion: int, trained: Tensor) -> list[Sample]:
        """One `Sample` per row of [B, T] ids and mask; trained [B, C]: completion tokens that have a loss."""
        completion = real.clone()
        completion[:, :-num_completion] = False
        tool = completion.clone()
        tool[:, -num_completion:] &= ~trained
        return samples_of(
            ids,
            completion,
            attention_mask=real,
            prompt_mask=real & ~completion,
            tool_mask=tool,
            truncated=self._cut_off(ids[:, -num_completion:], completion[:, -num_completion:]),
        )

    def _cut_off(self, completion_ids: Tensor, completion: Tensor) -> list[bool]:
        """[B] as TRL sees it: the last token neither ends a response nor is a pad."""
        ends = torch.tensor([*self.eos_token_ids, self.processing_class.pad_token_id], device=completion_ids.device)
        last = (completion.sum(1, keepdim=True) - 1).clamp(min=0)
        return (~torch.isin(completion_ids.gather(1, last)[:, 0], ends)).tolist()

    # --- credits in a pass that TRL makes anyway ----------------------------------------------------------------------

    def _reuses_a_pass(self) -> bool:
        """Will TRL compute old log-probabilities with the model that is to be read? Its own condition, in its words."""
        flow, args = self.flow, self.args
        if not flow.reuse or flow.scorer is not None or flow.score in BASELINES:
            return False
        misaligned = args.gradient_accumulation_steps % (args.steps_per_generation * self.num_iterations) != 0
        return misaligned or (self.use_vllm and self.vllm_importance_sampling_correction)

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's; the third of what it returns are the masks of tool output, needed before the batch is there."""
        found = super()._generate(*args, **kwargs)
        self._flow_tools = found[2]
        return found

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *args: Any, **kwargs: Any
    ) -> Any:
        inputs = (model, input_ids, attention_mask, logits_to_keep, *args)
        if self._flow_wanted:  # the first call of a batch is the one for old log-probabilities, a reference comes later
            self._flow_wanted = False
            completion = attention_mask[:, -logits_to_keep:].bool()
            trained = completion & _tool_mask(self._flow_tools, completion)
            batch = self._samples(input_ids, attention_mask.bool(), logits_to_keep, trained)
            self._flow_taken = _Taken(self._flow_tracer, batch)
            with recording(model, layers=self.flow.layers, on_capture=self._flow_taken, values=self._flow_values):
                found = super()._get_per_token_logps_and_entropies(*inputs, **kwargs)
        else:
            found = super()._get_per_token_logps_and_entropies(*inputs, **kwargs)
        self._flow_entropy = None if found[1] is None else found[1].detach()
        return found

    # --- credits of a sharded policy ----------------------------------------------------------------------------------

    @property
    def _flow_values(self) -> bool:
        """Are the norms of values wanted beside queries and keys?"""
        return self.flow.weights == "value_norm"

    @property
    def _flow_tracer(self) -> Tracer:
        scorer = self._flow_crediting.scorer
        assert isinstance(scorer, Scorer)
        return scorer.tracer

    def _score_together(self, batch: list[Sample], moved: list[bool]) -> list[SampleScore]:
        """Scores from whole passes of a sharded policy, as many on every process: some are of dummies."""
        chosen = [n for n, one in enumerate(batch) if moved[n] and one.response_mask.any()]
        parts = list(chunks([len(batch[n]) for n in chosen], self.flow.max_batch_tokens))
        device = self.accelerator.device
        number = int(self.accelerator.gather(torch.tensor([len(parts)], device=device)).max())
        found = {n: SampleScore.blank(one, "empty") for n, one in enumerate(batch)}
        dummy = torch.zeros(1, 4).long()
        extra: dict[str, Any] = {"use_cache": False}
        if "logits_to_keep" in inspect.signature(_base_of(self._flow_tracer.model).forward).parameters:
            extra["logits_to_keep"] = 1
        with torch.no_grad(), evaluation_mode(self.model):
            for part in [*parts, *[[]] * (number - len(parts))]:
                numbers = [chosen[place] for place in part]
                samples = [batch[n] for n in numbers]
                places = [torch.arange(len(one)) for one in samples]
                width = max((len(one) for one in samples), default=0)
                ids = _laid_out([one.token_ids for one in samples], places, width) if part else dummy
                real = _laid_out([torch.ones(len(one)).long() for one in samples], places, width) if part else dummy + 1
                with (
                    recording(self.model, layers=self.flow.layers, values=self._flow_values) as captures,
                    self.accelerator.autocast(),
                ):
                    self.model(input_ids=ids.to(device), attention_mask=real.to(device), **extra)
                if part:
                    scores = _scores(self._flow_tracer, samples, places, captures[0])
                    found |= dict(zip(numbers, scores, strict=True))
        return [found[n] for n in range(len(batch))]

    # --- another model that scores ------------------------------------------------------------------------------------

    def _refresh_the_scorer(self) -> None:
        every, step = self.flow.refresh_steps, self.state.global_step
        if not every or (self._flow_refreshed is not None and step < self._flow_refreshed + every):
            return
        policy = self.accelerator.unwrap_model(self.model)
        scorer = self._flow_crediting.scorer
        keep_adapters = isinstance(scorer, Scorer) and _has_adapters(scorer.model)
        scorer.refresh(_whole_weights(policy) if keep_adapters or not _has_adapters(policy) else _merged(policy))
        self._flow_refreshed = step

    # --- logs: every process takes part in each of these, whatever it has scored --------------------------------------

    def _log_shares(self, factors: Factors) -> None:
        """Shares of the responses with a non-zero advantage, over all processes; "scored": their own share."""
        counts = torch.tensor([float(n) for n in factors.counts.values()], device=self.accelerator.device)
        sums = dict(zip(factors.counts, self.accelerator.reduce(counts, "sum").tolist(), strict=True))
        samples, scored = sums.pop("samples"), sums.pop("scored")
        self._metrics["train"]["flow/scored"].append(scored / samples)
        for name, count in sums.items():
            if scored:
                self._metrics["train"][f"flow/{name}"].append(count / scored)

    def _log_means(self, numbers: dict[str, float]) -> None:
        """Means over the processes that have the number."""
        mine = torch.tensor([[numbers.get(key, torch.nan) for key in KEYS]], device=self.accelerator.device)
        for key, mean in zip(KEYS, self.accelerator.gather(mine).nanmean(0).tolist(), strict=True):
            if mean == mean:
                self._metrics["train"][f"flow/{key}"].append(mean)

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """TRL's loss; the entropies that it computes on the way say how far credits and entropy agree."""
        loss = super()._compute_loss(model, inputs)
        entropy, self._flow_entropy = self._flow_entropy, None
        if "flow_weights" in inputs and entropy is not None:
            overlap = entropy_overlap(inputs["flow_weights"], inputs["flow_mask"], entropy)
            overlap = overlap[~overlap.isnan()]
            self._log_means({"entropy_overlap": float(overlap.mean())} if len(overlap) else {})
        return loss


class FlowGRPOTrainer(FlowMixin, GRPOTrainer):
    """TRL's `GRPOTrainer` whose updates concentrate on the tokens that carried the answer.

    Example:
        >>> trainer = FlowGRPOTrainer(model, reward, args=args, train_dataset=dataset, flow=FlowConfig(gain=1.5))
        >>> trainer.train()
    """


# --- from TRL's layout and back ---------------------------------------------------------------------------------------


def _tool_mask(tools: list[list[int]] | None, completion: Tensor) -> Tensor:
    """[B, C] bool, as TRL pads it: False at tool output."""
    mask = torch.ones_like(completion)
    for row, one in enumerate(tools or []):
        mask[row, : len(one)] = torch.tensor(one, device=mask.device).bool()
    return mask


def _by_sample(advantages: Tensor, completion: Tensor, batch: list[Sample]) -> list[Any]:
    """Advantages [B] or [B, C] -> per sample a number, or [N] with 0 at the prompt."""
    if advantages.ndim == 1:
        return advantages.tolist()
    out = []
    for row, one in enumerate(batch):
        values = torch.zeros(len(one))
        values[one.response_mask] = advantages[row][completion[row]].float().cpu()
        out.append(values)
    return out


def _to_layout(values: Sequence[Tensor], batch: list[Sample], out: Tensor) -> Tensor:
    """Per sample [N] -> the completion part of each, in `out` [B, C]."""
    for row, (value, one) in enumerate(zip(values, batch, strict=True)):
        said = value[one.response_mask]
        out[row, : len(said)] = said.to(out.dtype)
    return out


def _laid_out(values: list[Tensor], places: list[Tensor], width: int) -> Tensor:
    """Per sample [N] and the places of its tokens in a row -> [B, T], zeros elsewhere."""
    out = torch.zeros(len(values), width, dtype=values[0].dtype)
    for row, (value, place) in enumerate(zip(values, places, strict=True)):
        out[row, place] = value
    return out


# --- scores out of a pass that somebody else makes --------------------------------------------------------------------


class _Taken:
    """Takes the scores out of TRL's passes one by one, rows in order, so that no queries and keys pile up."""

    def __init__(self, tracer: Tracer, batch: list[Sample]) -> None:
        self.found: list[SampleScore] = []
        self.seconds = 0.0
        self._tracer, self._batch = tracer, batch

    def __call__(self, captured: Capture) -> None:
        began = time.perf_counter()
        samples = self._batch[len(self.found) : len(self.found) + captured.shape[0]]
        self.found += _scores(self._tracer, samples, [one.positions for one in samples], captured)
        self.seconds += time.perf_counter() - began

    def fits(self, batch: list[Sample]) -> bool:
        """Are these the samples that were scored? A trainer may have changed its masks since."""
        fields = ("token_ids", "prompt_mask", "response_mask", "tool_mask")
        return len(self.found) == len(batch) and all(
            torch.equal(getattr(mine, name), getattr(theirs, name))
            for mine, theirs in zip(self._batch, batch, strict=True)
            for name in fields
        )


def _scores(tracer: Tracer, samples: list[Sample], places: list[Tensor], captured: Capture) -> list[SampleScore]:
    """Scores of the rows of one pass; a sample that can't be scored costs no other."""
    found = [SampleScore.blank(one, "empty") for one in samples]
    said = [row for row, one in enumerate(samples) if one.response_mask.any()]

    def score(chosen: list[int]) -> list[SampleScore]:
        rows = [said[place] for place in chosen]
        where = [places[row] for row in rows]

        def lay_out(values: list[Tensor]) -> Tensor:
            return _laid_out(values, where, captured.shape[1])

        return trace_samples(tracer, [samples[row] for row in rows], lay_out, captured.select(rows))

    for row, one in zip(said, isolated([samples[row] for row in said], score), strict=True):
        found[row] = one
    return found


# --- weights of the policy, for a scorer ------------------------------------------------------------------------------


def _has_adapters(model: Any) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def _base_of(model: Any) -> Any:
    return model.get_base_model() if _has_adapters(model) else model


def _whole_weights(model: Any) -> dict[str, Tensor]:
    """The state dict of a model that may be sharded by FSDP2, on every process. All of them have to take part."""
    weights = {}
    for name, value in model.state_dict().items():
        # Gathered one by one and kept on the CPU: a device never holds more than one whole weight.
        whole = value.full_tensor().cpu() if isinstance(value, DTensor) else value
        weights[name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")] = whole
    return weights


def _merged(model: Any) -> dict[str, Tensor]:
    """The weights of a model with LoRA adapters, merged, by the names of the bare model. The model stays as it is."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}
    weights = {}
    for name, value in model.state_dict().items():
        owner, _, last = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")
        if last == "base_layer" and owner in layers:
            layer: Any = layers[owner]
            if not hasattr(layer, "get_delta_weight") or getattr(layer, "lora_variant", None):
                raise ValueError(
                    f"refresh_steps can merge plain LoRA only, {owner} is {type(layer).__name__} with "
                    f"{getattr(layer, 'lora_variant', None) or 'no get_delta_weight'}; set it to 0"
                )
            if name.endswith(".weight") and not layer.merged:
                with torch.no_grad():
                    # Kept on the CPU, so that a device never holds more than one merged weight.
                    value = (value + sum(layer.get_delta_weight(adapter) for adapter in layer.active_adapters)).cpu()
            weights[f"{owner}.{name.rpartition('.')[2]}"] = value
        elif "original_module." in name:
            continue
        elif ".modules_to_save." in name:
            before, _, after = name.partition(".modules_to_save.")
            weights[f"{before}.{after.partition('.')[2]}"] = value
        elif not any(name.startswith(f"{inside}.") for inside in layers):
            weights[name] = value
    return {name.removeprefix("base_model.model."): value for name, value in weights.items()}
