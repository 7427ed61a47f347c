"""One or more traces as a single HTML page that needs nothing but a browser.

The page is a set of jinja2 templates (``templates/``, autoescape on): ``page.html.j2`` with the style
(``page.css.j2``) and the script (``data``, ``text``, ``arcs``, ``outline``, ``panel``, ``page`` ``.js.j2``). The traces
go in as JSON in a ``<script type="application/json">`` that the browser never runs, and the page's own script puts
every string into the document as text. A Content-Security-Policy allows that one script and that one style, by
their hashes, and no request.

A trace of 32,768 tokens with 16 edges per token makes a file of about 10 MB: columns of numbers are packed (base64 of
little-endian arrays; numbers of tokens and edges as float32), and only the text in view is in the document.

Shapes: N tokens, K edges, M segments.
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

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from flowgraph.credit import SCORES

_TEMPLATES = Path(__file__).parent / "templates"
_KEYS = (
    "version", "model", "layers", "rule", "preset", "solver", "score", "flags",
    "answer", "tokens", "edges", "summary",
)  # fmt: skip
_TOKENS: dict[str, type] = {  # column -> what it holds, each of length N
    "text": str, "id": int, "role": str, "source": bool, "sink": bool, "credited": bool,
    "reach": float, "throughput": float, "weight": float,
}  # fmt: skip
_ANSWER: dict[str, type] = {"text": str, "start": int, "stop": int, "finder": str}
_SEGMENTS: dict[str, type] = {"start": int, "stop": int, "kind": str, "flow": float}  # each of length M
_CHECKPOINT: dict[str, type] = {"start": int, "stop": int, "lost": float}
_ROLES = ("prompt", "response", "answer", "other")

# What could end the script element or the line, and what UTF-8 can't hold.
_UNSAFE_IN_SCRIPT = re.compile("[<>&\u2028\u2029\ud800-\udfff]")


def render(traces: Sequence[Mapping[str, Any]], *, title: str = "FlowGraph") -> str:
    """The page for `traces`, each a mapping as ``Trace.to_dict()`` gives it.

    ``tokens`` holds columns of length N: ``throughput`` is inflow + outflow where one unit of flow is
    injected in all, so half of it is the share of the flow that passes the token. ``edges`` holds columns of
    length K, the strongest edges by flow, with ``share``, the part of all edge flow that these K carry.

    A trace may hold more, and the page shows each only where it is there:

    * ``title``: its name among several.
    * ``segments``: a coarser graph, shown beside the text. ``by`` names it ("sentences"); columns ``start``, ``stop``
      (in tokens), ``kind`` and ``flow`` (share that passes) of length M, in the order of the text and without overlap;
      ``edges`` with columns ``source``, ``target``, ``flow`` between segments.
    * ``backbone``: ``edges`` (``source``, ``target``, ``flow``) whose subgraph delivers the share ``delivered``.
    * ``checkpoints``: a list of ``{start, stop, lost}``, tokens without which that share of the reach is lost.
    * ``measures``: name -> ``{value, about}``; a value of None is shown as a dash.

    Raises:
        TypeError: `traces` is no sequence, or `title` no string.
        ValueError: no trace; a key is missing or of the wrong type, columns differ in length, a number isn't
            finite or doesn't fit 32 bits, or an index points outside the trace. Names the trace's index and the key.
    """
    if isinstance(traces, (str, bytes, Mapping)) or not isinstance(traces, Sequence):
        got = type(traces).__name__
        raise TypeError(f"traces must be a list of traces, got {got}; put one trace in a list")
    if not traces:
        raise ValueError("traces is empty; a page needs at least one trace")
    if not isinstance(title, str):
        raise TypeError(f"title must be a str, got {type(title).__name__}")
    data = [_packed(trace, f"traces[{number}]") for number, trace in enumerate(traces)]
    env = Environment(loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined)
    env.filters["csp_hash"] = _csp_hash
    template = env.get_template("page.html.j2")
    return template.render(title=title, version=data[0]["version"], data=_script_json(data))


def write(path: str | Path, traces: Sequence[Mapping[str, Any]], *, title: str = "FlowGraph") -> Path:
    """Render `traces` (see :func:`render`) into the file `path`, in UTF-8; its folder is made if need be."""
    html = render(traces, title=title)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html, encoding="utf-8", newline="\n")
    return path


def _csp_hash(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(str(content).encode()).digest()).decode()


def _script_json(data: Any) -> Markup:
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Markup(_UNSAFE_IN_SCRIPT.sub(lambda match: f"\\u{ord(match[0]):04x}", text))


# ------------------------------------------------------------------------------------------------ one trace


def _packed(trace: Any, where: str) -> dict[str, Any]:
    """What the page needs of `trace`, checked: the documented keys and nothing else, columns of numbers packed."""
    if not isinstance(trace, Mapping):
        raise ValueError(f"{where} must be a mapping as Trace.to_dict() gives it, got {type(trace).__name__}")
    for key in _KEYS:
        if key not in trace:
            raise ValueError(f"{where} has no key {key!r}; it needs {', '.join(_KEYS)}")
    clean: dict[str, Any] = {
        key: _value(trace[key], str, f"{where}[{key!r}]")
        for key in ("version", "model", "rule", "preset", "solver", "score")
    }
    clean["layers"] = _column(trace["layers"], int, f"{where}['layers']").tolist()
    clean["flags"] = _column(trace["flags"], str, f"{where}['flags']")
    if clean["score"] not in SCORES:
        raise ValueError(f"{where}['score'] must be one of {SCORES}, got {clean['score']!r}")
    if trace.get("title") is not None:
        clean["title"] = _value(trace["title"], str, f"{where}['title']")

    tokens = _columns(trace["tokens"], _TOKENS, f"{where}['tokens']")
    size = len(tokens["text"])
    if size == 0:
        raise ValueError(f"{where}['tokens'] is empty; a page needs at least one token")
    for role in sorted(set(tokens["role"]) - set(_ROLES)):
        raise ValueError(f"{where}['tokens']['role'] holds {role!r}; roles are {', '.join(_ROLES)}")
    tokens["role"] = np.array([_ROLES.index(role) for role in tokens["role"]], dtype=np.uint8)
    clean["tokens"] = {key: column if key == "text" else _pack(column) for key, column in tokens.items()}

    clean["edges"] = _edges(trace["edges"], size, f"{where}['edges']", weight=True)
    if "share" not in trace["edges"]:
        raise ValueError(f"{where}['edges'] has no key 'share'")
    clean["edges"]["share"] = _value(trace["edges"]["share"], float, f"{where}['edges']['share']")

    clean["answer"] = None
    if trace["answer"] is not None:
        clean["answer"] = _span(trace["answer"], _ANSWER, size, f"{where}['answer']")
    clean["summary"] = {
        str(key): _summary(value, f"{where}['summary'][{key!r}]")
        for key, value in _mapping(trace["summary"], f"{where}['summary']").items()
    }
    for key, read in _OPTIONAL.items():
        if trace.get(key) is not None:
            clean[key] = read(trace[key], size, f"{where}[{key!r}]")
    return clean


def _segments(value: Any, size: int, where: str) -> dict[str, Any]:
    columns = _columns(value, _SEGMENTS, where)
    start, stop = columns["start"], columns["stop"]
    before = np.concatenate([[0], stop[:-1]])
    wrong = np.flatnonzero((start < before) | (stop <= start) | (stop > size))
    if len(wrong):
        m = int(wrong[0])
        raise ValueError(
            f"{where} has start {start[m]} and stop {stop[m]} at {m}; segments follow one another without overlap, "
            f"with start < stop <= {size}"
        )
    for key in ("by", "edges"):
        if key not in value:
            raise ValueError(f"{where} has no key {key!r}; it needs by, {', '.join(_SEGMENTS)}, edges")
    packed = {key: column if key == "kind" else _pack(column) for key, column in columns.items()}
    edges = _edges(value["edges"], len(start), f"{where}['edges']")
    return packed | {"by": _value(value["by"], str, f"{where}['by']"), "edges": edges}


def _backbone(value: Any, size: int, where: str) -> dict[str, Any]:
    fields = _fields(value, {"delivered": float}, where)
    if "edges" not in value:
        raise ValueError(f"{where} has no key 'edges'; it needs delivered, edges")
    return fields | {"edges": _edges(value["edges"], size, f"{where}['edges']")}


def _checkpoints(value: Any, size: int, where: str) -> list[dict[str, Any]]:
    return [_span(entry, _CHECKPOINT, size, f"{where}[{k}]") for k, entry in enumerate(_list(value, where))]


def _measures(value: Any, size: int, where: str) -> dict[str, Any]:
    measures = {}
    for name, entry in _mapping(value, where).items():
        here = f"{where}[{name!r}]"
        measures[str(name)] = _fields(entry, {"about": str}, here)
        if "value" not in entry:
            raise ValueError(f"{here} has no key 'value'; it needs value, about")
        number = entry["value"]
        measures[str(name)]["value"] = None if number is None else _value(number, float, f"{here}['value']")
    return measures


_OPTIONAL = {"segments": _segments, "backbone": _backbone, "checkpoints": _checkpoints, "measures": _measures}


def _edges(value: Any, size: int, where: str, *, weight: bool = False) -> dict[str, Any]:
    """Edges among `size` nodes by their target: those into node i are numbers into[i] .. into[i + 1] of `source`."""
    types: dict[str, type] = {"source": int, "target": int, "flow": float} | ({"weight": float} if weight else {})
    columns = _columns(value, types, where)
    source, target = columns["source"], columns.pop("target")
    wrong = np.flatnonzero((source < 0) | (target <= source) | (target >= size))
    if len(wrong):
        raise ValueError(
            f"{where} holds {source[wrong[0]]} -> {target[wrong[0]]}; an edge runs from 'source' to a later "
            f"'target', both in 0..{size - 1}"
        )
    order = np.argsort(target, kind="stable")
    into = np.zeros(size + 1, dtype=np.int32)
    np.cumsum(np.bincount(target, minlength=size), out=into[1:])
    return {"into": _pack(into)} | {key: _pack(column[order]) for key, column in columns.items()}


# ------------------------------------------------------------------------------------------------ values


def _mapping(value: Any, where: str) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} must be a mapping, got {type(value).__name__}")
    return value


def _list(value: Any, where: str) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{where} must be a list, got {type(value).__name__}")
    return value


def _fields(value: Any, types: Mapping[str, type], where: str) -> dict[str, Any]:
    for key in types:
        if key not in _mapping(value, where):
            raise ValueError(f"{where} has no key {key!r}; it needs {', '.join(types)}")
    return {key: _value(value[key], kind, f"{where}[{key!r}]") for key, kind in types.items()}


def _span(value: Any, types: Mapping[str, type], size: int, where: str) -> dict[str, Any]:
    """Fields with `start` and `stop`, a run of tokens."""
    span = _fields(value, types, where)
    if not 0 <= span["start"] < span["stop"] <= size:
        raise ValueError(
            f"{where} has start {span['start']} and stop {span['stop']}; it needs 0 <= start < stop <= {size}"
        )
    return span


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


def _column(value: Any, kind: type, where: str) -> Any:
    """A list of strings, or an array: bool as uint8, int as int32, float as float32."""
    plain = {kind, int} if kind is float else {kind}
    if not set(map(type, _list(value, where))) <= plain:  # half a million entries one by one would take seconds
        value = [_value(entry, kind, f"{where}[{number}]") for number, entry in enumerate(value)]
    if kind is str:
        return list(value)
    if kind is bool:
        return np.array(value, dtype=np.uint8)
    if kind is int:
        try:
            return np.array(value, dtype=np.int32)
        except OverflowError:
            big = next(number for number, entry in enumerate(value) if not -(2**31) <= entry < 2**31)
            raise ValueError(f"{where}[{big}] is {value[big]}; it must fit 32 bits") from None
    try:
        exact = np.array(value, dtype=np.float64)
    except OverflowError:
        big = next(number for number, entry in enumerate(value) if abs(entry) >= 2**1023)
        raise ValueError(f"{where}[{big}] is too large; it must be finite and fit 32 bits") from None
    with np.errstate(over="ignore"):
        column = exact.astype(np.float32)
    wrong = np.flatnonzero(~np.isfinite(column))
    if len(wrong):
        raise ValueError(f"{where}[{wrong[0]}] is {value[wrong[0]]}; it must be finite and fit 32 bits")
    # 0 says that no path leads there, so it mustn't come of rounding.
    column[(column == 0) & (exact != 0)] = np.finfo(np.float32).smallest_subnormal
    return column


def _pack(column: np.ndarray) -> dict[str, str]:
    """Type and content, as the script reads it: {"i4": base64 of int32, little-endian}."""
    little = column.astype(column.dtype.newbyteorder("<"), copy=False)
    return {f"{column.dtype.kind}{column.dtype.itemsize}": base64.b64encode(little.tobytes()).decode()}


def _value(value: Any, kind: type, where: str) -> Any:
    if kind is str and isinstance(value, str):
        return str(value)
    if kind is bool and isinstance(value, bool):
        return value
    if kind is int and isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    if kind is float and isinstance(value, Real) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            raise ValueError(f"{where} is larger than any float; it must be finite") from None
        if not math.isfinite(number):
            raise ValueError(f"{where} is {number}; it must be finite")
        return float(f"{number:.6g}")
    raise ValueError(f"{where} must be {kind.__name__}, got {type(value).__name__}")


def _summary(value: Any, where: str) -> Any:
    """A number, string, bool or None, or a list of them: the page shows whatever the summary holds."""
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, (list, tuple)):
        return [_summary(entry, where) for entry in value]
    return _value(value, int if isinstance(value, Integral) else float, where)
