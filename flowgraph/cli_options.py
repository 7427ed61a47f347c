"""The options that commands share, and what they stand for: the tracer's `Options`, a device, a model.

An option that sets a field of `Options` has the field's name; `tracer_options` collects them. Values are checked
here or by the library before a model is loaded, so that wrong usage is known at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flowgraph.terminal import reason, say, status

if TYPE_CHECKING:
    from flowgraph.options import Options
    from flowgraph.tracer import Tracer

INPUT, MODEL, METHOD, CREDIT, FINE, OUTPUT = (
    "What to trace", "Model", "Graph and flow", "Credit", "Fine tuning", "Output",
)  # fmt: skip
BACKENDS = ("auto", "torch", "torch_scatter", "cupy", "triton")
SOLVERS = ("auto", "scatter", "scipy", "blocks", "sweep", "reference")
FINDERS = ("auto", "boxed", "####", "A:", "<answer>", "answer is")
DIVISIONS = ("sentences", "words", "lines", "steps", "turns")
RULES = ("top", "proportional", "rank", "softmax", "keep")


# ------------------------------------------------------------------------- values


def _parse_layers(text: str) -> Any:
    if text in ("middle", "all"):
        return text
    if not re.fullmatch(r"\d{1,6}(,\d{1,6})*", text):
        raise typer.BadParameter(f"{text!r} is not middle, all, or layer numbers like 10,11,12")
    return [int(number) for number in text.split(",")]


def _parse_edges(text: str) -> tuple[str, float]:
    """The name of a rule of flowgraph.sparsify, and its number; ("auto", 0) for none."""
    try:
        if text in ("auto", "all"):
            return ("auto" if text == "auto" else "Threshold"), 0
        if text.startswith("top:"):
            return "TopK", int(text[4:])
        if text.startswith("mass:"):
            return "Mass", float(text[5:])
        above, _, below = text.partition("/")
        return "Threshold", float(above) / float(below or 1)
    except (ValueError, ZeroDivisionError):
        raise typer.BadParameter(f"{text!r} is not auto, all, a threshold like 1/1024, top:32 or mass:0.9") from None


def _parse_lines(text: str) -> list[range]:
    """Numbers and ranges of lines, from 1."""
    ranges = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,12})(?:-(\d{1,12}))?", part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= first <= last:
            raise typer.BadParameter(f"{text!r} is not lines like 1,5,8-10")
        ranges.append(range(first, last + 1))
    return ranges


def parse_names(text: str) -> list[str]:
    """Names with commas between."""
    names = [name.strip() for name in text.split(",")]
    if not all(names) or len(set(names)) < len(names):
        raise typer.BadParameter(f"{text!r} is not different names like these: a,b")
    return names


def parse_shares(text: str) -> list[float]:
    """Shares with commas between, each a number or a percentage."""
    try:
        return [float(part.strip().removesuffix("%")) / (100 if "%" in part else 1) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not shares like 0.05,0.2") from None


def _parse_pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise typer.BadParameter(f"{text!r} is no regular expression: {error}") from None


def _one_of(choices: Sequence[str]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise typer.BadParameter(f"{text!r} is not one of {', '.join(choices)}")
        return text

    return parse


# ------------------------------------------------------------------------- options


def _parse_chunk(text: Any) -> Any:
    if text is None or isinstance(text, int) or text == "auto":
        return text
    if str(text) == "none":
        return None
    if not str(text).isdigit() or int(text) < 2:
        raise typer.BadParameter(f"{text!r}: use auto, none or a number of tokens, at least 2")
    return int(text)


def _parse_bytes(text: Any) -> int | None:
    """2GB, 1.5GiB, 800MB or a plain number of bytes."""
    if text is None or isinstance(text, int):
        return text
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?) ?(?:([kmgt]?)(i?)b)?", str(text).strip().lower())
    factor = (1024 if match[3] else 1000) ** " kmgt".index(match[2] or " ") if match else 0
    number = int(float(match[1]) * factor) if match else 0
    if number < 1:
        raise typer.BadParameter(f"{text!r} is not an amount of memory like 2GB, 1.5GiB or 800MB")
    return number


def option(panel: str, name: str, help: str, metavar: str | None = None, **more: Any) -> Any:
    """A `typer.Option`; `name` may hold several, with blanks between: "--model -m"."""
    return typer.Option(*name.split(), help=help, metavar=metavar, rich_help_panel=panel, **more)


def choice(panel: str, name: str, choices: Sequence[str], help: str) -> Any:
    # A parser in place of an Enum: values hold "####" and the like.
    return option(panel, name, help, "NAME", parser=_one_of(choices))


_MODEL = "Folder or hub name of a causal language model, or smollm2, the small one of the demo."
_DTYPE = "Of its weights: float32, bfloat16, or auto: float32 on the CPU and as stored elsewhere."
_DEVICE = "cpu, cuda, cuda:1, mps, or auto: CUDA where there is one, else the CPU."
_CHAT = "Give the prompt as a user message to the chat template, or as it is."
Model = Annotated[str, option(MODEL, "--model -m", _MODEL, "MODEL")]
Dtype = Annotated[str, choice(MODEL, "--dtype", ("auto", "float32", "bfloat16"), _DTYPE)]
Device = Annotated[str, option(MODEL, "--device", _DEVICE, "NAME")]
Chat = Annotated[bool | None, option(MODEL, "--chat/--no-chat", _CHAT, show_default="chat if there is a template")]

_JSONL = "Both from one line of a file, in any form that score reads."
_LINES = "Which lines of IN, from 1, like 1,5,8-10. Default: all."
Prompt = Annotated[str | None, option(INPUT, "--prompt -p", "What the model was asked.", "TEXT")]
Response = Annotated[str | None, option(INPUT, "--response -r", "What it answered.", "TEXT")]
PromptFile = Annotated[Path | None, option(INPUT, "--prompt-file", "From a file; - is stdin.", "FILE")]
ResponseFile = Annotated[Path | None, option(INPUT, "--response-file", "The response likewise.", "FILE")]
Jsonl = Annotated[Path | None, option(INPUT, "--jsonl", _JSONL, "FILE")]
Line = Annotated[int, option(INPUT, "--line", "Which line, from 1.", "N", min=1)]
Lines = Annotated[Any, option(INPUT, "--lines", _LINES, "LINES", parser=_parse_lines)]

_LAYERS = "Layers whose attention counts: middle (third), all, or numbers like 10,11,12."
_PRESET = "Where flow ends: at the tokens that predict the answer (flowgraph) or at its own (paper)."
_MODE = (
    "edges: attention becomes edges, and flow runs through these. sparse: the same, and what becomes no edge is kept "
    "at low resolution. exact: the flow of the whole attention, which is streamed twice and never stored. auto: edges "
    "up to 2,048 tokens, or if --edges is given; else sparse (exact where attention is read again, as for a page)."
)
_EDGES = (
    "Which attention weights become edges: all, those over a threshold like 1/1024, the top:32 or the mass:0.9 of "
    "each token. auto is all up to 2,048 tokens, above that 1/1024, and 1/256 in mode sparse. In mode exact the rule "
    "chooses by the flow that an edge carries, only to list it, and auto is top:32."
)
_WEIGHTS = "What an edge weighs: attention, or attention times the norm of what it moves (value_norm)."
_FINDER = "How the answer is found: auto (the first that finds one), boxed, ####, A:, <answer>, answer is (or Answer:)."
_REGEX = "Find it with a regular expression: its group 1, if it has one."
_QUESTION = "Where flow starts: at every token of the prompt (prompt), or of the user's last turn in it (user)."
Layers = Annotated[Any, option(METHOD, "--layers", _LAYERS, "WHICH", parser=_parse_layers)]
Preset = Annotated[str, choice(METHOD, "--preset", ("flowgraph", "paper"), _PRESET)]
Mode = Annotated[str, choice(METHOD, "--mode", ("auto", "edges", "sparse", "exact"), _MODE)]
Weights = Annotated[str, choice(METHOD, "--weights", ("attention", "value_norm"), _WEIGHTS)]
Edges = Annotated[Any, option(METHOD, "--edges", _EDGES, "RULE", parser=_parse_edges)]
Answer = Annotated[str, choice(METHOD, "--answer", FINDERS, _FINDER)]
AnswerRegex = Annotated[Any, option(METHOD, "--answer-regex", _REGEX, "REGEX", parser=_parse_pattern)]
Question = Annotated[str, choice(METHOD, "--question", ("prompt", "user"), _QUESTION)]

_SCORE = "What tokens are ranked by: throughput, reach, or mix, the geometric mean of both; auto: what the preset says."
_RULE = "How scores become weights: top, proportional, rank, softmax; or keep: 1 for the top, 0 for the rest."
Score = Annotated[str, choice(CREDIT, "--score", ("auto", "throughput", "reach", "mix"), _SCORE)]
Rule = Annotated[str, choice(CREDIT, "--rule", RULES, _RULE)]
Top = Annotated[float, option(CREDIT, "--top", "Share of the tokens that the rules top and keep pick.", "SHARE")]
Gain = Annotated[float, option(CREDIT, "--gain", "The highest weight; 1 is neutral.", "WEIGHT")]

_NO_ANSWER = "Where none is found: every weight stays 1 (uniform), or the last tokens stand for it (tail)."
_MAX_TOKENS = "Refuse longer traces. Default: what the model says it can see."
_SOLVER = (
    "Of modes edges and sparse: scatter, scipy, blocks, sweep, reference (dense), or auto: scipy on the CPU and "
    "scatter elsewhere. docs/gpu.md says what each is for."
)
_BACKEND = (
    "The library that computes attention rows and flow: torch, torch_scatter, cupy or triton, which is used or refused "
    "with the reason; or auto: torch."
)
_ABSORB = "Flow leaves the prompt at once and never runs within it."
_TEMPERATURE = "Of the rule softmax: the lower, the fewer tokens get much."
NoAnswer = Annotated[str, choice(FINE, "--no-answer", ("uniform", "tail"), _NO_ANSWER)]
TailTokens = Annotated[int, option(FINE, "--tail-tokens", "How many that are.", "N", min=1)]
MaxTokens = Annotated[int | None, option(FINE, "--max-tokens", _MAX_TOKENS, "N", min=2)]
Solver = Annotated[str, choice(FINE, "--solver", SOLVERS, _SOLVER)]
Backend = Annotated[str, choice(FINE, "--backend", BACKENDS, _BACKEND)]
_CHUNK = "Tokens per pass through the model, for memory; none: all at once; auto: 4096 in traces over 16,384 tokens."
Chunk = Annotated[Any, option(FINE, "--chunk", _CHUNK, "N", parser=_parse_chunk)]
Offload = Annotated[bool, option(FINE, "--offload", "Let queries and keys wait in CPU memory.")]
_MEMORY = "Memory above the model that a trace may take, like 2GB: chunk, offload and mode auto are chosen to fit."
Memory = Annotated[Any, option(FINE, "--memory", _MEMORY, "BYTES", parser=_parse_bytes)]
AbsorbAtPrompt = Annotated[bool, option(FINE, "--absorb-at-prompt", _ABSORB)]
Temperature = Annotated[float, option(FINE, "--temperature", _TEMPERATURE, "T")]

_TRACEBACK = "Show where in the code an error came up (or set FLOWGRAPH_TRACEBACK=1)."
Verbose = Annotated[bool, option(OUTPUT, "--verbose -v", "Show what transformers and torch have to say.")]
Traceback = Annotated[bool, option(OUTPUT, "--traceback", _TRACEBACK, envvar="FLOWGRAPH_TRACEBACK", show_envvar=False)]


# ------------------------------------------------------------------------- what they stand for


def tracer_options(given: Mapping[str, Any]) -> Options:
    """The tracer's options out of a command's parameters; what the library refuses in them is wrong usage."""
    import torch

    from flowgraph.credit import weights_from_scores
    from flowgraph.options import Options
    from flowgraph.sparsify import Mass, Threshold, TopK

    values = {field.name: given[field.name] for field in fields(Options) if field.name in given}
    if given["answer_regex"] is not None:
        values["answer"] = given["answer_regex"]
    rule, number = values["edges"]
    rules: dict[str, Any] = {"Threshold": Threshold, "TopK": TopK, "Mass": Mass}
    how = {name: values[name] for name in ("rule", "top", "gain", "temperature")}
    try:
        values["edges"] = None if rule == "auto" else rules[rule](number)
        weights_from_scores(torch.ones(1), torch.ones(1, dtype=torch.bool), **how)
        return Options(**values)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def load(given: Mapping[str, Any]) -> tuple[Tracer, bool]:
    """A tracer as a command's parameters have it, and whether a prompt in text form is a chat message.

    It has been tried out on two tokens: what fails there would fail on every trace.
    """
    name, chat = given["model"], given["chat"]
    _check_model(name)
    options = tracer_options(given)
    device = _device(given["device"])
    with status(f"Loading {name}", given["quiet"]):
        import torch

        from flowgraph.tracer import Tracer

        model, tokenizer = _model(name, given["dtype"], device)
        has_template = bool(getattr(tokenizer, "chat_template", None))
        if chat and not has_template:
            raise ValueError(f"the tokenizer of {name} has no chat template; leave --chat out, or use --no-chat")
        first = torch.tensor([[True, False]])
        Tracer(model, **vars(options)).from_ids(first.long(), prompt_mask=first, question_mask=first, sink_mask=~first)
    return Tracer(model, tokenizer, **vars(options)), has_template if chat is None else chat


def place_of(model: str) -> str:
    """A model by a name that holds in any working directory: a folder by its whole path."""
    folder = Path(model).expanduser()
    return str(folder.absolute()) if folder.is_dir() else model


def outline(name: str, dtype: str, device: str) -> tuple[Any, Any]:
    """A model without its weights, as `flowgraph.memory` needs it, and the device that it is meant for."""
    _check_model(name)
    place = _device(device)
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = Path(name).expanduser()
    if name == "smollm2":
        from flowgraph import smollm2

        folder = smollm2.folder(say=say)
    try:
        config = AutoConfig.from_pretrained(str(folder) if folder.is_dir() else name, trust_remote_code=False)
        if dtype == "auto":
            stored = getattr(config, "dtype", None) or torch.float32
            kind = torch.float32 if place.type == "cpu" else stored
        else:
            kind = getattr(torch, dtype)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=kind, trust_remote_code=False)
    except Exception as error:
        raise RuntimeError(f"--model {name} has no configuration that can be read: {reason(error)}") from error
    return model, place


def _check_model(name: str) -> None:
    """Refuse a folder that isn't one before anything slow begins."""
    folder = Path(name).expanduser()
    if not folder.is_dir() and (folder.exists() or name.startswith((".", "/", "~"))):
        raise ValueError(f"--model {name}: there is no such folder")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(f"--model {name}: the folder has no config.json; save_pretrained of transformers makes one")


def _device(name: str) -> Any:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise typer.BadParameter(f"--device {name!r}: use auto, cpu, cuda, cuda:1 or mps") from None
    found = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= found.get(device.type, 0):
        raise ValueError(f"there is no device {name} here; flowgraph doctor lists what there is")
    return device


def _model(name: str, dtype: str, device: Any) -> tuple[Any, Any]:
    """The model, ready to be used, and its tokenizer."""
    import torch

    if dtype == "auto":
        dtype = "float32" if device.type == "cpu" else "stored"
    if name == "smollm2":
        from flowgraph import smollm2

        model, tokenizer = smollm2.load(torch.float32 if dtype == "float32" else torch.bfloat16, say=say)
    else:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = Path(name).expanduser()
        place = str(folder) if folder.is_dir() else name
        try:
            # False, and not left out: transformers would ask on standard input, which may be a trace, whether to run
            # the code that comes with a model.
            how = {"trust_remote_code": False}
            tokenizer = AutoTokenizer.from_pretrained(place, **how)
            model = AutoModelForCausalLM.from_pretrained(place, dtype="auto" if dtype == "stored" else dtype, **how)
        except Exception as error:
            raise RuntimeError(f"--model {name} cannot be loaded: {reason(error)}") from error
    return model.eval().to(device), tokenizer
