"""Token credits in TRL: `FlowGRPOTrainer` is `GRPOTrainer` with one more argument, `flow=FlowConfig(...)`.

    TRL generates, rewards, makes advantages [B]          (untouched)
      -> the responses with a non-zero advantage are traced with the policy itself, without gradient
      -> advantages [B, C] = weights [B, C] * advantages  (flowgraph.rl.shape_advantages)
      -> TRL's own loss, which takes advantages of either shape

Nothing else of TRL is replaced: generation, rewards, the loss, its denominator and its clipping stay what they are.
A response that cannot be traced keeps weight 1 and is counted in the logs. docs/trainers/trl.md has the whole story.

Shapes: B responses, P prompt tokens (padded left), C completion tokens (padded right), T = P + C.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flowgraph.answers import find_answer
from flowgraph.credit import SCORES, weights_from_scores
from flowgraph.options import Options
from flowgraph.rl.monitor import KEYS, entropy_overlap, monitor
from flowgraph.rl.shaping import Signs, shape_advantages
from flowgraph.spans import NO_ANSWER, PRESETS
from flowgraph.tracer import Tracer

try:
    from trl.trainer.grpo_trainer import GRPOTrainer
except ImportError as error:
    raise ImportError('flowgraph.adapters.trl needs TRL: pip install "flowgraph-llm[trl]"') from error

if TYPE_CHECKING:
    from trl.trainer.grpo_trainer import GRPOTrainer as _Base
else:
    _Base = object

_RATIO_OF_THE_SEQUENCE_IS_HARMLESS = ("cispo", "vespo")
"""Loss types whose gradient is advantage * d log p of each token even with one importance ratio per sequence."""


@dataclass(frozen=True)
class FlowConfig(Options):
    """How a trainer gets its credits: the `Options` of a `Tracer`, and what is done with the weights.

    Attributes:
        signs: the advantages that are weighted: "both", only "positive" or only "negative".
        normalize: divide the weights of a response by their mean, so that its share of the update keeps its size.
        warmup_steps: optimizer steps over which the weights go linearly from 1 to what `gain` makes of them.
        max_batch_tokens: tokens, pads included, of one forward pass for credits. A longer response goes alone.
        scorer: the model that is traced; None: the policy itself. Another one must have the same tokenizer; it is
            moved to the trainer's device, unless a device map says where it is.
    """

    signs: Signs = "both"
    normalize: bool = False
    warmup_steps: int = 0
    max_batch_tokens: int = 16384
    scorer: nn.Module | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        # What else would only show up as samples that fail, one by one.
        one = torch.ones(1)
        weights_from_scores(one, one.bool(), self.rule, top=self.top, gain=self.gain, temperature=self.temperature)
        shape_advantages(one, one[:, None], one[:, None].bool(), signs=self.signs)
        find_answer("", self.answer)
        for name, choices in (("score", SCORES), ("preset", PRESETS), ("no_answer", NO_ANSWER)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {list(choices)}, got {getattr(self, name)!r}")
        if self.question != "prompt":
            raise ValueError(f'question must be "prompt", got {self.question!r}: a trainer keeps ids, not messages')
        if self.tail_tokens < 1:
            raise ValueError(f"tail_tokens must be at least 1, got {self.tail_tokens}")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must be at least 0, got {self.warmup_steps}")
        if self.max_batch_tokens < 1:
            raise ValueError(f"max_batch_tokens must be at least 1, got {self.max_batch_tokens}")

    def warmed(self, weights: Tensor, step: int) -> Tensor:
        """The weights at an optimizer step, counted from 0: every rule is linear in the gain, so 1 + part * (w - 1)."""
        if step >= self.warmup_steps:
            return weights
        return 1 + (weights - 1) * (step / self.warmup_steps)

    def tracer(self, model: nn.Module, tokenizer: Any) -> Tracer:
        """A `Tracer` with these options."""
        return Tracer(model, tokenizer, **{option.name: getattr(self, option.name) for option in fields(Options)})


class FlowMixin(_Base):
    """Credits for a trainer of the GRPO family: `class Mine(FlowMixin, GRPOTrainer)`, then `Mine(..., flow=...)`.

    A subclass with a `_compute_loss` of its own is refused until it says `takes_token_advantages = True`: that its
    loss takes advantages [B, C] and that its gradient is theirs, token by token.

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
        super().__init__(*args, **kwargs)
        self.flow = FlowConfig() if flow is None else flow
        self._flow_entropy: Tensor | None = None
        self._refuse_what_would_do_nothing()
        scorer = self.flow.scorer
        if scorer is not None and getattr(scorer, "hf_device_map", None) is None:
            scorer.to(self.accelerator.device)
        self._try_the_tracer()

    def _refuse_what_would_do_nothing(self) -> None:
        args = self.args
        if args.importance_sampling_level == "sequence" and args.loss_type not in _RATIO_OF_THE_SEQUENCE_IS_HARMLESS:
            raise ValueError(
                f'importance_sampling_level="sequence" with loss_type="{args.loss_type}" gives every token of a '
                "response the same gradient: credits would only scale whole responses by their mean weight (by 1 with "
                f'normalize=True). Use "token", or loss_type {" or ".join(_RATIO_OF_THE_SEQUENCE_IS_HARMLESS)}'
            )
        owner = next(c for c in type(self).__mro__ if c is not FlowMixin and "_compute_loss" in vars(c))
        if owner is not GRPOTrainer and not self.takes_token_advantages:
            raise ValueError(
                f"{owner.__name__} has a _compute_loss of its own. If that takes advantages [B, C] and its gradient "
                "is advantage times d log p of each token, set takes_token_advantages = True on the class"
            )
        if self._is_vlm:
            raise ValueError(
                "processing_class is the processor of a vision-language model, whose images credits do not trace. "
                "For training on text alone, pass its tokenizer: processing_class=processor.tokenizer"
            )
        sharded = "FSDP" if self.is_fsdp_enabled else "DeepSpeed ZeRO-3" if self._is_zero3() else None
        if sharded and self.flow.scorer is None:
            raise ValueError(
                f"the policy is sharded by {sharded}, and a pass that stops early and has another number of chunks on "
                "each process would hang it. Pass FlowConfig(scorer=...), a copy of the policy or a smaller model with "
                "the same tokenizer that fits on each process"
            )

    def _is_zero3(self) -> bool:
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        return plugin is not None and plugin.zero_stage == 3

    def _try_the_tracer(self) -> None:
        """Trace six tokens, so that a model, a layer or an option that cannot work says so now."""
        model = self._flow_model()
        embeddings, words = model.get_input_embeddings().num_embeddings, len(self.processing_class)
        if self.flow.scorer is not None and embeddings < words:
            raise ValueError(
                f"scorer has {embeddings} token embeddings, the tokenizer {words} tokens: it must be a model with the "
                "tokenizer of the policy"
            )
        ids = torch.arange(6)[None] % embeddings
        place = torch.arange(6)[None]
        tracer = self.flow.tracer(model, self.processing_class)
        try:
            tracer.from_ids(ids, prompt_mask=place < 2, sink_mask=place == 4)
        except ValueError as error:
            raise ValueError(f"flow: {'scorer' if self.flow.scorer else 'model'} can't be traced: {error}") from error

    def _flow_model(self) -> Any:
        return self.accelerator.unwrap_model(self.model) if self.flow.scorer is None else self.flow.scorer

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's batch with advantages [B, C] in it. Evaluation, which takes no gradient, is left alone."""
        output = super()._generate_and_score_completions(inputs)
        if self.model.training:
            began = time.perf_counter()
            self._put_credits_into(output)
            seconds = self.accelerator.gather(
                torch.tensor([time.perf_counter() - began], device=self.accelerator.device)
            )
            self._metrics["train"]["flow/seconds"].append(seconds.max().item())
        return output

    def _put_credits_into(self, output: dict[str, Any]) -> None:
        advantages, completion = output["advantages"], output["completion_mask"].bool()
        trained = completion & output["tool_mask"].bool() if "tool_mask" in output else completion
        per_row = advantages if advantages.ndim == 1 else advantages.masked_fill(~trained, 0).sum(1)
        moved = (advantages != 0) if advantages.ndim == 1 else ((advantages != 0) & trained).any(1)
        rows = (moved & trained.any(1)).nonzero().flatten().tolist()

        batch = _Batch(
            ids=torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1),
            prompt=torch.cat([output["prompt_mask"].bool(), torch.zeros_like(completion)], dim=1),
            response=torch.cat([torch.zeros_like(output["prompt_mask"]).bool(), completion], dim=1),
            tool=torch.cat([torch.zeros_like(output["prompt_mask"]).bool(), completion & ~trained], dim=1),
            truncated=self._cut_off(output["completion_ids"], completion),
        )
        tracer = self.flow.tracer(self._flow_model(), self.processing_class)
        credits = _credits(tracer, batch, rows, self.flow.max_batch_tokens)
        for why in credits.failed.values():
            # The same text is shown once (Python's default filter); the share of such rows is in the log.
            warnings.warn(f"no credits for a response, its weights stay 1: {why}", stacklevel=3)

        responses = slice(output["prompt_ids"].shape[1], None)
        weights = credits.weights[:, responses].to(advantages.device)
        mask = credits.mask[:, responses].to(advantages.device)
        weights = self.flow.warmed(weights, self.state.global_step)
        output["advantages"] = shape_advantages(
            advantages, weights.to(advantages), trained, signs=self.flow.signs, normalize=self.flow.normalize
        )
        output["flow_weights"], output["flow_mask"] = weights, mask  # [B, C], shuffled and split along by TRL

        # A response without a single token left to train on was not traced: empty, or masked because it was cut off.
        blank = int((moved & ~trained.any(1)).sum())
        flags = [flag for row in credits.flags.values() for flag in set(row)]
        cut_off, no_answer = flags.count("cut_off"), flags.count("no_answer")
        cut_off += blank if self.mask_truncated_completions else 0
        no_answer += 0 if self.mask_truncated_completions else blank
        self._log_shares(
            len(rows) + blank,
            {
                "no_answer": no_answer,
                "cut_off": cut_off,
                "no_flow": flags.count("no_flow"),
                "failed": len(credits.failed),
            },
            len(completion),
        )
        traced = [row for row in rows if row in credits.flags]
        seen = monitor(
            credits.throughput[:, responses][traced].to(weights),
            weights[traced],
            mask[traced],
            text=[credits.text[row][responses] for row in traced],
            rewards=per_row[traced] if traced else None,
        )
        self._log_means(seen)

    def _cut_off(self, completion_ids: Tensor, completion: Tensor) -> list[bool]:
        """[B] as TRL sees it: the last token neither ends a response nor is a pad."""
        ends = torch.tensor([*self.eos_token_ids, self.processing_class.pad_token_id], device=completion_ids.device)
        last = (completion.sum(1, keepdim=True) - 1).clamp(min=0)
        return (~torch.isin(completion_ids.gather(1, last)[:, 0], ends)).tolist()

    # Every process takes part in each of these, whatever it has traced.

    def _log_shares(self, rows: int, counts: dict[str, int], all_rows: int) -> None:
        """Shares of the responses with a non-zero advantage, over all processes; "scored": their own share."""
        numbers = torch.tensor([all_rows, rows, *counts.values()], device=self.accelerator.device).float()
        of_all, of_rows, *found = self.accelerator.reduce(numbers, "sum").tolist()
        self._metrics["train"]["flow/scored"].append(of_rows / of_all)
        for name, count in zip(counts, found, strict=True):
            if of_rows:
                self._metrics["train"][f"flow/{name}"].append(count / of_rows)

    def _log_means(self, numbers: dict[str, float]) -> None:
        """Means over the processes that have the number."""
        mine = torch.tensor([[numbers.get(key, torch.nan) for key in KEYS]], device=self.accelerator.device)
        for key, mean in zip(KEYS, self.accelerator.gather(mine).nanmean(0).tolist(), strict=True):
            if mean == mean:
                self._metrics["train"][f"flow/{key}"].append(mean)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self._flow_entropy = None if found[1] is None else found[1].detach()
        return found

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


# --- from a batch to its credits --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Batch:
    """Token ids [B, T] and masks [B, T] bool: prompt, response, and tool output inside the response."""

    ids: Tensor
    prompt: Tensor
    response: Tensor
    tool: Tensor
    truncated: list[bool]


@dataclass(frozen=True)
class _Credits:
    """On the CPU, [B, T]: weights (1 where nothing was traced), throughput, and the tokens that could get credit."""

    weights: Tensor
    throughput: Tensor
    mask: Tensor
    text: list[list[str]]
    flags: dict[int, tuple[str, ...]]
    """Row -> what was odd, for the rows that were traced."""
    failed: dict[int, str]
    """Row -> why it could not be traced."""


def _credits(tracer: Tracer, batch: _Batch, rows: list[int], max_tokens: int) -> _Credits:
    """Trace some rows of a batch, in chunks; the others, and those that can't be traced, have weight 1."""
    shape = batch.ids.shape
    nothing = torch.zeros(shape)
    out = _Credits(torch.ones(shape), nothing, torch.zeros(shape).bool(), [[""] * shape[1] for _ in batch.ids], {}, {})
    for chunk in _chunks(batch, rows, max_tokens):
        try:
            _trace(tracer, batch, chunk, out)
        except ValueError:  # of one row; it must not take the others along
            for row in chunk:
                try:
                    _trace(tracer, batch, [row], out)
                except ValueError as error:
                    out.failed[row] = str(error)
    return out


def _chunks(batch: _Batch, rows: list[int], max_tokens: int) -> Iterator[list[int]]:
    """Rows of similar length together, each chunk at most `max_tokens` with its pads, or one row."""
    prompt, response = batch.prompt.sum(1).tolist(), batch.response.sum(1).tolist()
    chunk: list[int] = []
    for row in sorted(rows, key=lambda row: prompt[row] + response[row]):
        wider = [*chunk, row]
        width = max(prompt[r] for r in wider) + max(response[r] for r in wider)
        if chunk and len(wider) * width > max_tokens:
            yield chunk
            wider = [row]
        chunk = wider
    if chunk:
        yield chunk


def _trace(tracer: Tracer, batch: _Batch, rows: list[int], out: _Credits) -> None:
    real = (batch.prompt | batch.response)[rows]
    columns = real.any(0).nonzero().flatten()  # without the columns in which all of these rows have pads
    traces = tracer.from_ids(
        batch.ids[rows][:, columns],
        real[:, columns],
        batch.prompt[rows][:, columns],
        response_mask=batch.response[rows][:, columns],
        tool_mask=batch.tool[rows][:, columns],
        truncated=[batch.truncated[row] for row in rows],
    )
    columns = columns.cpu()
    for trace in traces:
        row, places = rows[trace.row], columns[trace.positions.cpu()]
        out.weights[row, places] = trace.weights.float().cpu()
        out.throughput[row, places] = trace.throughput.float().cpu()
        out.mask[row, places] = trace.graph.credit_mask.cpu()
        out.flags[row] = trace.flags
        for place, piece in zip(places.tolist(), trace.text or [], strict=True):
            out.text[row][place] = piece
