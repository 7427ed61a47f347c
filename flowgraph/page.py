"""One or more traces as a single HTML page that needs nothing but a browser.

The page is one jinja2 template (``templates/trace.html.j2``, autoescape on). The traces go in as JSON in a
``<script type="application/json">`` that the browser never runs, and the page's own script puts every string
into the document as text. A Content-Security-Policy allows that one script, by its hash, and no request.

Left out on purpose: graphs of thousands of tokens. Every token is an element of the document.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

_TEMPLATES = Path(__file__).parent / "templates"
_KEYS = (
    "version", "model", "layers", "rule", "preset", "solver", "score", "flags",
    "answer", "tokens", "edges", "summary",
)  # fmt: skip
_TOKENS: dict[str, type] = {  # column -> what it holds, each of length N
    "text": str, "id": int, "role": str, "source": bool, "sink": bool, "credited": bool,
    "reach": float, "throughput": float, "weight": float,
}  # fmt: skip
_EDGES: dict[str, type] = {"source": int, "target": int, "weight": float, "flow": float}  # of length K
_ANSWER: dict[str, type] = {"text": str, "start": int, "stop": int, "finder": str}
_ROLES = ("prompt", "response", "answer", "other")
_SCORES = ("throughput", "reach")

# What could end the script element or the line, and what UTF-8 can't hold.
_UNSAFE_IN_SCRIPT = re.compile("[<>&\u2028\u2029\ud800-\udfff]")


def render(traces: Sequence[Mapping[str, Any]], *, title: str = "FlowGraph") -> str:
    """The page for `traces`, each a mapping as ``Trace.to_dict()`` gives it; floats keep 6 digits.

    ``tokens`` holds columns of length N: ``throughput`` is inflow + outflow where one unit of flow is
    injected in all, so half of it is the share of the flow that passes the token. ``edges`` holds columns of
    length K, the strongest edges by flow, with ``share``, the part of all edge flow that these K carry.

    Raises:
        TypeError: `traces` is no sequence, or `title` no string.
        ValueError: no trace; a key is missing or of the wrong type, columns differ in length, a number isn't
            finite, or an index points outside the trace. Names the trace's index and the key.
    """
    if isinstance(traces, (str, bytes, Mapping)) or not isinstance(traces, Sequence):
        got = type(traces).__name__
        raise TypeError(f"traces must be a list of traces, got {got}; put one trace in a list")
    if not traces:
        raise ValueError("traces is empty; a page needs at least one trace")
    if not isinstance(title, str):
        raise TypeError(f"title must be a str, got {type(title).__name__}")
    data = [_checked(trace, f"traces[{number}]") for number, trace in enumerate(traces)]
    env = Environment(loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined)
    env.filters["csp_hash"] = _csp_hash
    template = env.get_template("trace.html.j2")
    return template.render(title=title, version=data[0]["version"], data=_script_json(data))


def write(path: str | Path, traces: Sequence[Mapping[str, Any]], *, title: str = "FlowGraph") -> Path:
    """Render `traces` (see :func:`render`) into the file `path`, in UTF-8; its folder is made if need be."""
    html = render(traces, title=title)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html, encoding="utf-8", newline="\n")
    return path


def _csp_hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(str(script).encode()).digest()).decode()


def _script_json(data: Any) -> Markup:
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Markup(_UNSAFE_IN_SCRIPT.sub(lambda match: f"\\u{ord(match[0]):04x}", text))


def _checked(trace: Any, where: str) -> dict[str, Any]:
    """A copy of `trace` with rounded floats that holds the documented keys and nothing else."""
    if not isinstance(trace, Mapping):
        raise ValueError(f"{where} must be a mapping as Trace.to_dict() gives it, got {type(trace).__name__}")
    for key in _KEYS:
        if key not in trace:
            raise ValueError(f"{where} has no key {key!r}; it needs {', '.join(_KEYS)}")
    clean: dict[str, Any] = {
        key: _value(trace[key], str, f"{where}[{key!r}]")
        for key in ("version", "model", "rule", "preset", "solver", "score")
    }
    clean["layers"] = _column(trace["layers"], int, f"{where}['layers']")
    clean["flags"] = _column(trace["flags"], str, f"{where}['flags']")
    if clean["score"] not in _SCORES:
        raise ValueError(f"{where}['score'] must be one of {_SCORES}, got {clean['score']!r}")
    if trace.get("title") is not None:
        clean["title"] = _value(trace["title"], str, f"{where}['title']")

    tokens = clean["tokens"] = _columns(trace["tokens"], _TOKENS, f"{where}['tokens']")
    size = len(tokens["text"])
    if size == 0:
        raise ValueError(f"{where}['tokens'] is empty; a page needs at least one token")
    for role in tokens["role"]:
        if role not in _ROLES:
            raise ValueError(f"{where}['tokens']['role'] holds {role!r}; roles are {', '.join(_ROLES)}")

    edges = clean["edges"] = _columns(trace["edges"], _EDGES, f"{where}['edges']")
    for source, target in zip(edges["source"], edges["target"], strict=True):
        if not 0 <= source < target < size:
            raise ValueError(
                f"{where}['edges'] holds {source} -> {target}; an edge runs from 'source' to a later "
                f"'target', both in 0..{size - 1}"
            )
    if "share" not in trace["edges"]:
        raise ValueError(f"{where}['edges'] has no key 'share'")
    edges["share"] = _value(trace["edges"]["share"], float, f"{where}['edges']['share']")

    clean["answer"] = None
    if trace["answer"] is not None:
        answer = clean["answer"] = _fields(trace["answer"], _ANSWER, f"{where}['answer']")
        if not 0 <= answer["start"] < answer["stop"] <= size:
            raise ValueError(
                f"{where}['answer'] has start {answer['start']} and stop {answer['stop']}; "
                f"it needs 0 <= start < stop <= {size}"
            )
    clean["summary"] = {
        str(key): _summary(value, f"{where}['summary'][{key!r}]")
        for key, value in _mapping(trace["summary"], f"{where}['summary']").items()
    }
    return clean


def _mapping(value: Any, where: str) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} must be a mapping, got {type(value).__name__}")
    return value


def _fields(value: Any, types: Mapping[str, type], where: str) -> dict[str, Any]:
    for key in types:
        if key not in _mapping(value, where):
            raise ValueError(f"{where} has no key {key!r}; it needs {', '.join(types)}")
    return {key: _value(value[key], kind, f"{where}[{key!r}]") for key, kind in types.items()}


def _columns(value: Any, types: Mapping[str, type], where: str) -> dict[str, Any]:
    """The columns named in `types`, all as long as the first one."""
    for key in types:
        if key not in _mapping(value, where):
            raise ValueError(f"{where} has no column {key!r}; it needs {', '.join(types)}")
    columns = {key: _column(value[key], kind, f"{where}[{key!r}]") for key, kind in types.items()}
    first, *others = columns
    for key in others:
        if len(columns[key]) != len(columns[first]):
            raise ValueError(
                f"{where}[{key!r}] has {len(columns[key])} entries, but {first!r} has {len(columns[first])}"
            )
    return columns


def _column(value: Any, kind: type, where: str) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{where} must be a list, got {type(value).__name__}")
    return [_value(entry, kind, f"{where}[{number}]") for number, entry in enumerate(value)]


def _value(value: Any, kind: type, where: str) -> Any:
    if kind is str and isinstance(value, str):
        return str(value)
    if kind is bool and isinstance(value, bool):
        return value
    if kind is int and isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    if kind is float and isinstance(value, Real) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ValueError(f"{where} is {value}; it must be finite")
        return float(f"{float(value):.6g}")
    raise ValueError(f"{where} must be {kind.__name__}, got {type(value).__name__}")


def _summary(value: Any, where: str) -> Any:
    """A number, string, bool or None, or a list of them: the page shows whatever the summary holds."""
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, (list, tuple)):
        return [_summary(entry, where) for entry in value]
    return _value(value, int if isinstance(value, Integral) else float, where)
