"""Where the question, the response and the answer are, and which tokens are sources and sinks.

    text -> find_answer -> its characters -> token_offsets, tokens_of -> tokens s..e -> sinks_of -> sinks

A token is produced by the position before it, so preset "flowgraph" ends the flow at the positions that
*predict* the answer, s-1..e-1; preset "paper" ends it at the answer tokens s..e. Only this file decides that:
graphs, solvers and `trace_flow` take sources and sinks as they come.

Left out: models and weights. A tokenizer is anything that behaves like one of Hugging Face transformers.
"""

from __future__ import annotations

import reprlib
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile
from typing import Any

import torch
from torch import Tensor

from flowgraph.answers import FLAGS, TAG, Finder, Span, find_answer

PRESETS = ("flowgraph", "paper")
NO_ANSWER = ("uniform", "tail")


# ------------------------------------------------------------------------- characters and tokens


_BROKEN = "\N{REPLACEMENT CHARACTER}"  # what a decoder shows for bytes that are no character


def token_offsets(tokenizer: Any, token_ids: Sequence[int]) -> tuple[str, list[Span]]:
    """The text of N tokens, special tokens kept and nothing cleaned up, and the characters of each token.

    Starts and stops never decrease, the first start is 0, the last stop is `len(text)`, no character is left
    out. Tokens that share a character (the bytes of an emoji) all get it; a token without text gets an empty
    range. The ids need not be those that the tokenizer would give to the text. Work: O(N) tokens decoded, in
    windows of a few: a token is settled where the window's text is what stands in the full text and is
    no replacement character that the next token may complete (as vLLM and TGI stream text). Among broken
    bytes the ranges may be wider than needed.
    """

    def decode(ids: Sequence[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    ids = [int(i) for i in token_ids]
    text = decode(ids) if ids else ""
    offsets: list[Span] = []
    heads: list[int] = []  # first tokens of the settled groups
    context = ""  # text of ids[left:done], decoded along because decoders treat a first token differently
    left = done = position = 0
    while done < len(ids):
        settled = [0]  # after 0, 1, 2, ... tokens of the group: its characters that are final
        size = 1
        while done + size < len(ids):
            window = decode(ids[left : done + size])
            piece = window[len(context) :]
            if window.startswith(context) and text.startswith(piece, position):
                if not piece.endswith(_BROKEN):
                    break
                longer = decode(ids[left : done + size + 1])
                if len(longer) > len(window) and longer.startswith(window):
                    break  # broken bytes: no later token completes them
            if size < 16:
                pairs = zip(piece.rstrip(_BROKEN), text[position:], strict=False)
                settled.append(max(settled[-1], sum(1 for _ in takewhile(lambda xy: xy[0] == xy[1], pairs))))
                size += 1
            else:
                size *= 2  # a long run of broken bytes; doubling keeps the work linear
        else:
            size, piece = len(ids) - done, text[position:]
        for k in range(size):
            start = min(settled[min(k, len(settled) - 1)], len(piece))
            stop = min(settled[k + 1] + 1, len(piece)) if k + 1 < len(settled) else len(piece)
            offsets.append((position + start, position + stop))
        heads.append(done)
        position += len(piece)
        done += size
        for left in heads[:-9:-1]:
            context = decode(ids[left:done])
            if context and text.endswith(context, 0, position):
                break  # enough tokens to be decoded as they are in the full text
    return text, offsets


def tokens_of(offsets: Sequence[Span], start: int, stop: int) -> Span:
    """The fewest tokens that hold the characters [start, stop): a half-open range, empty if none does."""
    if not 0 <= start < stop:
        raise ValueError(f"characters must satisfy 0 <= start < stop, got start={start}, stop={stop}")
    first = bisect_right(offsets, start, key=lambda span: span[1])
    return first, max(first, bisect_left(offsets, stop, key=lambda span: span[0]))


def sinks_of(answer_tokens: Tensor, preset: str = "flowgraph") -> Tensor:
    """Sinks [N] of answer tokens [N]: themselves ("paper") or the positions before them ("flowgraph")."""
    _choice("preset", preset, PRESETS)
    if preset == "paper":
        return answer_tokens.clone()
    if answer_tokens[:1].any():
        raise ValueError(
            "answer_tokens marks token 0, which no position predicts: preset 'flowgraph' has no sink for it; "
            "give the tokens before the answer too, or use preset='paper'"
        )
    return torch.cat([answer_tokens[1:], answer_tokens.new_zeros(1)])


# ------------------------------------------------------------------------- ids and masks of a trace


@dataclass(frozen=True, eq=False)
class Encoded:
    """Token ids [N] (int64), masks [N] (bool, disjoint). A token may be neither: tool output."""

    token_ids: Tensor
    prompt_mask: Tensor
    response_mask: Tensor


_NEITHER, _PROMPT, _RESPONSE = range(3)


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _joined(pieces: list[tuple[list[int], int]]) -> Encoded:
    ids = torch.tensor([i for piece, _ in pieces for i in piece], dtype=torch.long)
    role = torch.tensor([role for piece, role in pieces for _ in piece], dtype=torch.long)
    return Encoded(ids, role == _PROMPT, role == _RESPONSE)


def encode_text(tokenizer: Any, prompt: str, response: str) -> Encoded:
    """Tokenise a prompt with the tokenizer's own special tokens and a response without, then join the ids.

    So no token crosses the boundary, as in generation. A prompt that a chat template has rendered already
    holds its special tokens: use `encode_messages`.
    """
    pieces = [(list(tokenizer(prompt)["input_ids"]), _PROMPT), (_encode(tokenizer, response), _RESPONSE)]
    for (ids, _), name, text in zip(pieces, ("prompt", "response"), (prompt, response), strict=True):
        if not ids:
            raise ValueError(f"{name} has no tokens: {text!r}")
    return _joined(pieces)


TemplateOptions = Mapping[str, Any] | None


def _render(tokenizer: Any, messages: Sequence[dict[str, Any]], generate: bool, options: TemplateOptions) -> str:
    more = options or {}
    return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generate, **more)


def _plain(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with text as content, in place of its parts: templates of models for text alone know no parts."""
    plain = []
    for k, message in enumerate(messages):
        if isinstance(parts := message.get("content"), list):
            if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
                raise ValueError(f"messages[{k}]: content holds parts that are no text, and only text can be traced")
            message = {**message, "content": "".join(part["text"] for part in parts)}
        plain.append(message)
    return plain


def conversation(
    prompt: Sequence[dict[str, Any]], response: str | Sequence[dict[str, Any]] | None
) -> tuple[list[dict[str, Any]], int | None]:
    """Prompt and response as one list of messages, and `first` as `encode_messages` takes it.

    Args:
        response: text, the messages of an agent's rollout, or None where it is among those of the prompt.

    Raises:
        ValueError: something else, or a response that doesn't begin with an assistant message.
    """
    for name, given in (("prompt", prompt), ("response", response)):
        if isinstance(given, Mapping):
            raise ValueError(f"{name} must be text or a list of chat messages, got one message: put it into a list")
        if given is None or isinstance(given, str):
            continue
        if not isinstance(given, Sequence) or not all(isinstance(one, Mapping) for one in given):
            raise ValueError(f"{name} must be text or a list of chat messages, got {_what(given)}")
    if response is None:
        return list(prompt), None
    said = [{"role": "assistant", "content": response}] if isinstance(response, str) else list(response)
    if not said or said[0].get("role") != "assistant":
        role = f"role {said[0].get('role')!r}" if said else "none"
        raise ValueError(f"response must begin with an assistant message, got {role}")
    return [*prompt, *said], len(prompt)


def _first_assistant(messages: Sequence[dict[str, Any]]) -> int:
    return next((k for k, m in enumerate(messages) if m.get("role") == "assistant"), len(messages))


def encode_messages(
    tokenizer: Any,
    messages: Sequence[dict[str, Any]],
    first: int | None = None,
    template_options: TemplateOptions = None,
) -> Encoded:
    """Tokenise a conversation by the tokenizer's chat template, each part on its own, as in generation.

    Prompt: all up to and with the generation prompt of `messages[first]`. Response: every assistant message from there
    on, with its end token. Neither: the messages and template text between and after them.

    Args:
        first: where the response begins: `len(messages) - 1` for the last message alone, after examples or a history.
            Default: the first assistant message, as in the rollout of an agent, whose every turn is its response.
        template_options: further keyword arguments of the chat template.
    """
    messages = _plain(messages)
    last = messages[-1] if messages else {}
    if last.get("role") != "assistant":
        raise ValueError(f"the last message must be an assistant one, got role {last.get('role')!r}")
    if not isinstance(last.get("content"), str) or not last["content"].strip():
        raise ValueError(f"the last message needs text as content, got {last.get('content')!r}")
    first = _first_assistant(messages) if first is None else first
    if first == 0:
        raise ValueError("messages[0] is an assistant message, so there is no prompt; put the question first")
    if not 0 < first < len(messages) or messages[first].get("role") != "assistant":
        raise ValueError(f"first must be the number of an assistant message, the first of the response, got {first!r}")
    pieces: list[tuple[list[int], int]] = []
    done = ""
    for k in range(first, len(messages)):
        if messages[k].get("role") != "assistant":
            continue
        head = _render(tokenizer, messages[:k], True, template_options)
        tail = _render(tokenizer, messages[: k + 1], False, template_options)
        if not head.startswith(done) or not tail.startswith(head):
            raise ValueError(
                f"the chat template changes earlier text when messages[{k}] is added, so what was generated "
                "can't be told; give prompt and response as text, or token ids and masks"
            )
        _check_shown(tokenizer, messages[k], tail[len(head) :], k)
        ids = _encode(tokenizer, tail[len(head) :])
        sampled = _sampled(tokenizer, ids)
        pieces += [
            (_encode(tokenizer, head[len(done) :]), _PROMPT if k == first else _NEITHER),
            (ids[:sampled], _RESPONSE),
            (ids[sampled:], _NEITHER),
        ]
        done = tail
    return _joined(pieces)


def _check_shown(tokenizer: Any, message: dict[str, Any], shown: str, k: int) -> None:
    """A template that knows content in parts only shows nothing of a text."""
    for special in tokenizer.all_special_tokens:
        shown = shown.replace(special, "")
    if str(message.get("content") or "").strip() and not shown.strip():
        raise ValueError(
            f"the chat template shows nothing of the text of messages[{k}]; give prompt and response as text, or token "
            "ids and masks"
        )


def _sampled(tokenizer: Any, ids: list[int]) -> int:
    """How many tokens of a rendered assistant message were generated: no blanks that follow its end token."""
    special = set(tokenizer.all_special_ids)
    end = max((k + 1 for k, i in enumerate(ids) if i in special), default=len(ids))
    return len(ids) if tokenizer.decode(ids[end:]).strip() else end


def question_of_messages(
    tokenizer: Any,
    messages: Sequence[dict[str, Any]],
    encoded: Encoded,
    first: int | None = None,
    template_options: TemplateOptions = None,
) -> Tensor:
    """Mask [N] of the tokens of the question: what the user's last turn in the prompt says, without the template.

    The turn is the last user message before the response, and any before it that no assistant message sets apart: the
    questions of examples and of a history have answers of their own. Each content is found by rendering the prompt once
    more with a placeholder in its place: a search for its text could hit the system prompt or the template.

    Args:
        first, template_options: those that `encode_messages` was given.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError("tokenizer is not a fast one and gives no offsets; give question_mask yourself")
    prompt = _plain(messages[: _first_assistant(messages) if first is None else first])
    text = _render(tokenizer, prompt, True, template_options)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    if encoded.token_ids[encoded.prompt_mask].tolist() != list(encoding["input_ids"]):
        raise ValueError("encoded does not hold the prompt of these messages; make it with encode_messages")
    where = encoded.prompt_mask.nonzero().flatten()
    question = torch.zeros_like(encoded.prompt_mask)
    for k in _last_turn(prompt):
        message = prompt[k]
        content = message.get("content")
        if not isinstance(content, str):
            raise ValueError(f"messages[{k}]: content must be text, not {_what(content)}")
        place = "\ufffc" * (text.count("\ufffc") + 1)  # the object replacement character
        other = [*prompt[:k], {**message, "content": place}, *prompt[k + 1 :]]
        start = _render(tokenizer, other, True, template_options).find(place)
        shown = next((c for c in (content, content.strip()) if text.startswith(c, start)), None)
        if start < 0 or shown is None:
            raise ValueError(f"the chat template rewrites the content of messages[{k}]; give question_mask")
        if shown.strip():
            question[where[slice(*tokens_of(encoding["offset_mapping"], start, start + len(shown)))]] = True
    if not question.any():
        raise ValueError("no user message with text before the response; give question_mask")
    return question


def _last_turn(messages: Sequence[dict[str, Any]]) -> list[int]:
    """The numbers of the user messages of the last turn that has any, ascending."""
    roles = [message.get("role") for message in messages]
    last = max((k for k, role in enumerate(roles) if role == "user"), default=-1)
    begins = max((k for k in range(last) if roles[k] == "assistant"), default=-1) + 1
    return [k for k in range(begins, last + 1) if roles[k] == "user"]


# ------------------------------------------------------------------------- the whole way


@dataclass(frozen=True, eq=False)
class Spans:
    """Who is who among the N tokens of a trace. All masks are [N] bool on the CPU."""

    prompt_mask: Tensor
    question_mask: Tensor  # the sources
    response_mask: Tensor
    answer_tokens: Tensor  # s..e; empty if the caller gave the sinks
    answer_mask: Tensor  # the sinks
    credit_mask: Tensor  # tokens that may get credit
    flags: tuple[str, ...]  # of FLAGS
    answer_text: str | None  # as the finder found it
    finder: str | None  # the finder that found it


def locate(
    token_ids: Tensor,
    prompt_mask: Tensor,
    response_mask: Tensor | None = None,
    *,
    tokenizer: Any = None,
    answer: Finder = "auto",
    preset: str = "flowgraph",
    question_mask: Tensor | None = None,
    answer_tokens: Tensor | None = None,
    sink_mask: Tensor | None = None,
    tool_mask: Tensor | None = None,
    special_ids: Collection[int] = (),
    truncated: bool = False,
    no_answer: str = "uniform",
    tail_tokens: int = 16,
) -> Spans:
    """Sources, sinks and the tokens that may get credit of one trace of N tokens. Masks are [N] bool.

    Args:
        response_mask: default: all that is no prompt. It may have holes.
        answer: the finder, see `find_answer`. It is used, and a tokenizer needed, if neither `sink_mask` (the
            sinks themselves, taken as they are) nor `answer_tokens` (the tokens s..e) is given.
        question_mask: the sources, inside the prompt; default: the prompt.
        tool_mask: response tokens that the model did not write. Never searched, never credited.
        special_ids: more special tokens than the tokenizer knows. Never credited.
        truncated: the response was cut; adds flag "cut_off".
        no_answer: "uniform": no sinks, flag "no_answer" (an all-False mask means this too); "tail": the last
            `tail_tokens` response tokens are the answer, special and tool tokens aside, also "tail_answer".

    Finders read the response only; a hole reads as a line break. Named finders don't see special tokens (a
    line break too) but `<answer>` and `</answer>`; your own finders see special tokens on lines of their own.
    """
    _choice("preset", preset, PRESETS)
    _choice("no_answer", no_answer, NO_ANSWER)
    check_tail(tail_tokens)
    if not isinstance(token_ids, Tensor) or token_ids.dim() != 1 or token_ids.dtype not in _INTEGERS:
        raise ValueError(f"token_ids must be a tensor [N] of integers, got {_what(token_ids)}")
    n = token_ids.numel()
    if n < 2:
        raise ValueError(f"a trace needs at least 2 tokens, a prompt and a response, got {n}")
    ids = token_ids.cpu().long()
    prompt = _mask("prompt_mask", prompt_mask, n)
    response = ~prompt if response_mask is None else _mask("response_mask", response_mask, n)
    question = prompt if question_mask is None else _mask("question_mask", question_mask, n)
    tool = torch.zeros_like(prompt) if tool_mask is None else _mask("tool_mask", tool_mask, n)
    for name, mask in (("prompt_mask", prompt), ("response_mask", response), ("question_mask", question)):
        if not mask.any():
            raise ValueError(f"{name} marks no token: the {name[:-5]} is empty")
    _inside("response_mask", response, ~prompt, "in prompt_mask too; a token is at most one of the two")
    _inside("question_mask", question, prompt, "outside the prompt; sources must be prompt tokens")
    special = _special(special_ids) | set(getattr(tokenizer, "all_special_ids", ()))
    is_special = torch.isin(ids, torch.tensor(sorted(special), dtype=ids.dtype))

    flags = {"cut_off"} if truncated else set()
    sinks, tokens = None, torch.zeros_like(prompt)
    answer_text = finder = None
    if sink_mask is not None:
        sinks = _mask("sink_mask", sink_mask, n)
    elif answer_tokens is not None:
        tokens = _mask("answer_tokens", answer_tokens, n).clone()
    elif tokenizer is None:
        raise ValueError("finding the answer needs tokenizer; give it, or answer_tokens, or sink_mask")
    else:
        text, offsets, positions = _searched(tokenizer, ids.tolist(), response & ~tool, special, answer)
        found = find_answer(text, answer)
        flags |= set(found.flags)
        if found.match:
            answer_text, finder = text[found.match.start : found.match.stop], found.match.finder
            tokens[positions[slice(*tokens_of(offsets, found.match.start, found.match.stop))]] = True
            if not tokens.any():
                raise ValueError(f"finder {finder!r} found {answer_text!r}, which no token holds: a break")

    if not (tokens if sinks is None else sinks).any():
        sinks = None
        flags.add("no_answer")
        tail = (response & ~is_special & ~tool).nonzero().flatten()[-tail_tokens:]
        if no_answer == "tail" and tail.numel():
            tokens[tail] = True
            flags.add("tail_answer")
    _inside("answer_tokens", tokens, ~prompt, "inside the prompt: the answer starts in the prompt")
    _inside("answer_tokens", tokens, response, "outside the response")
    return Spans(
        prompt_mask=prompt,
        question_mask=question,
        response_mask=response,
        answer_tokens=tokens,
        answer_mask=sinks_of(tokens, preset) if sinks is None else sinks,
        credit_mask=response & ~tokens & ~is_special & ~tool,
        flags=tuple(flag for flag in FLAGS if flag in flags),
        answer_text=answer_text,
        finder=finder,
    )


def check_tail(tail_tokens: int) -> None:
    """Raise a ValueError unless it is a number of tokens, 1 or more."""
    if not isinstance(tail_tokens, int) or isinstance(tail_tokens, bool):
        raise ValueError(f"tail_tokens must be a whole number, got {_what(tail_tokens)}")
    if tail_tokens < 1:
        raise ValueError(f"tail_tokens must be at least 1, got {tail_tokens}")


def _searched(
    tokenizer: Any, ids: list[int], mask: Tensor, special: set[int], finder: Finder
) -> tuple[str, list[Span], Tensor]:
    """The text that a finder reads, and the characters and the position of each token in it."""
    hidden: set[int] = set()
    if isinstance(finder, str):  # an end-of-turn token would be read as part of the answer
        hidden = {i for i in special if not TAG.fullmatch(tokenizer.decode([i]).strip())}
    positions = [p for p in mask.nonzero().flatten().tolist() if ids[p] not in hidden]
    text = ""
    offsets: list[Span] = []
    for _, run in groupby(enumerate(positions), key=lambda kp: (kp[1] - kp[0], ids[kp[1]] in special)):
        piece, spans = token_offsets(tokenizer, [ids[p] for _, p in run])
        text += "\n" if offsets else ""
        offsets += [(len(text) + start, len(text) + stop) for start, stop in spans]
        text += piece
    return text, offsets, torch.tensor(positions, dtype=torch.long)


_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _special(ids: object) -> set[int]:
    if isinstance(ids, Tensor) and ids.layout == torch.strided:
        ids = ids.tolist()
    values = list(ids) if isinstance(ids, Iterable) else ids
    if not isinstance(values, list) or not all(isinstance(i, int) and 0 <= i < 2**63 for i in values):
        raise ValueError(f"special_ids must be token ids, numbers from 0, got {reprlib.repr(ids)}")
    return set(values)


def _what(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _mask(name: str, mask: object, n: int) -> Tensor:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != (n,):
        raise ValueError(f"{name} must be a bool tensor [{n}], one entry per token, got {_what(mask)}")
    return mask.cpu()


def _inside(name: str, mask: Tensor, allowed: Tensor, problem: str) -> None:
    bad = (mask & ~allowed).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"{name} marks {len(bad)} tokens (the first: {bad[0]}) {problem}")


def _choice(name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"unknown {name} {value!r}; use one of {list(allowed)}")
