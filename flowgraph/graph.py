"""TokenGraph: one reasoning trace as a sparse PyG graph in time order.

Shapes: N tokens, E edges, M pools, L links between tokens and pools. An edge `i -> k` says that information runs from
the earlier token `i` to the later token `k`, because `k` attends to `i`; its weight is that attention, `W[k, i]`. The
diagonal of `W` is no edge.

A `TokenGraph` is an ordinary `torch_geometric.data.Data`: `Batch.from_data_list`, `DataLoader`, `.to(device)` and
`batch[i]` work as for any PyG graph, and every function of FlowGraph takes one graph or a batch of them.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch_geometric.data import Batch, Data

from flowgraph.pools import Pools

if TYPE_CHECKING:
    from flowgraph.sparsify import Edges

FORMAT = "flowgraph/2"
"""Name and version of the file format, in the metadata of every saved graph."""

MASKS = ("prompt_mask", "question_mask", "answer_mask", "response_mask", "credit_mask")
_NODE_TENSORS = (*MASKS, "token_ids", "self_weight", "dropped")
_POOL_TENSORS = ("pool_index", "pool_weight", "pool_collects", "pool_shape")
_TENSORS = ("edge_index", "edge_weight", *_NODE_TENSORS, *_POOL_TENSORS)


class TokenGraph(Data):
    """A trace as a directed acyclic graph in time order.

    Attributes:
        edge_index: [2, E] int64; row 0 the earlier token, row 1 the later one. Sorted by target, then source; unique.
        edge_weight: [E] float32 or float64, finite and >= 0: the attention `W[target, source]`.
        prompt_mask: [N] bool, the tokens of the prompt.
        question_mask: [N] bool, the sources of flow; the prompt, unless it was narrowed.
        answer_mask: [N] bool, the *sinks* of flow. None at all means that no answer was found.
        response_mask: [N] bool, what the model wrote.
        credit_mask: [N] bool, the response tokens that may get credit (no answer, no special tokens, no tool output).
        token_ids: [N] int64, -1 where unknown.
        self_weight: [N], the diagonal of `W`, kept apart.
        dropped: [N], what the edges of each row (target) lost when the attention was made sparse.
        pool_index, pool_weight, pool_collects, pool_shape: [2, L], [L], [L], [N] the pools, which carry at low
            resolution what became no edge (flowgraph/pools.py); none in most graphs. Pools are no tokens: they count in
            no N, E or mask.
        model, layers, rule: where the graph came from: model name, layer numbers, the rule that chose the edges.
    """

    edge_index: Tensor
    edge_weight: Tensor
    prompt_mask: Tensor
    question_mask: Tensor
    answer_mask: Tensor
    response_mask: Tensor
    credit_mask: Tensor
    token_ids: Tensor
    self_weight: Tensor
    dropped: Tensor
    pool_index: Tensor
    pool_weight: Tensor
    pool_collects: Tensor
    pool_shape: Tensor
    model: str
    layers: list[int]
    rule: str

    @classmethod
    def from_edges(
        cls,
        edge_index: Tensor,
        edge_weight: Tensor,
        *,
        prompt_mask: Tensor,
        answer_mask: Tensor,
        question_mask: Tensor | None = None,
        response_mask: Tensor | None = None,
        credit_mask: Tensor | None = None,
        token_ids: Tensor | None = None,
        self_weight: Tensor | None = None,
        dropped: Tensor | None = None,
        pools: Pools | None = None,
        model: str = "",
        layers: Sequence[int] = (),
        rule: str = "given edges",
    ) -> TokenGraph:
        """Build a graph from an edge list in any order; it is stored sorted by target, then source.

        Args:
            edge_index: [2, E] int64, row 0 the earlier token, row 1 the later one.
            edge_weight: [E], finite, >= 0.
            prompt_mask, answer_mask: [N] bool; `answer_mask` marks the sinks of flow.
            question_mask: [N] bool, the sources. Default: the prompt.
            response_mask: [N] bool. Default: `~prompt_mask`.
            credit_mask: [N] bool. Default: the response without the sinks.
            token_ids: [N] int64. self_weight, dropped: [N]. Default: -1 and zeros.
            pools: what carries the weight that became no edge; default: nothing does.

        Raises:
            ValueError: names the argument or the broken law (see `validate`), what came and what to do.
        """
        num_tokens = prompt_mask.numel() if isinstance(prompt_mask, Tensor) else 0
        masks = flow_masks(num_tokens, prompt_mask, answer_mask, question_mask)
        response_mask = ~prompt_mask if response_mask is None else response_mask
        credit_mask = response_mask & ~answer_mask if credit_mask is None else credit_mask
        check_masks({"response_mask": response_mask, "credit_mask": credit_mask}, num_tokens)
        if not _is(edge_index, (2, -1), torch.int64):
            raise ValueError(
                f"edge_index must be [2, E] int64, got {_came(edge_index)}; "
                "row 0 holds the earlier tokens, row 1 the later ones"
            )
        num_edges = edge_index.shape[1]
        if not _is(edge_weight, (num_edges,), *_FLOATS):
            raise ValueError(f"edge_weight must be [E] = [{num_edges}] float32 or float64, got {_came(edge_weight)}")
        key = edge_index[1] * num_tokens + edge_index[0]
        if key.numel() > 1 and not bool((key[1:] > key[:-1]).all()):
            order = torch.argsort(key, stable=True)
            edge_index, edge_weight = edge_index[:, order], edge_weight[order]
        zeros = edge_weight.new_zeros(num_tokens)
        pools = Pools.none(zeros) if pools is None else pools
        graph = cls(
            edge_index=edge_index.contiguous(),
            edge_weight=edge_weight,
            prompt_mask=prompt_mask,
            question_mask=masks["question_mask"],
            answer_mask=answer_mask,
            response_mask=response_mask,
            credit_mask=credit_mask,
            token_ids=edge_index.new_full((num_tokens,), -1) if token_ids is None else token_ids,
            self_weight=zeros if self_weight is None else self_weight,
            dropped=zeros.clone() if dropped is None else dropped,
            pool_index=pools.index,
            pool_weight=pools.weight,
            pool_collects=pools.collects,
            pool_shape=pools.shape,
            num_nodes=num_tokens,
            model=model,
            layers=[int(layer) for layer in layers],
            rule=rule,
        )
        graph.validate()
        return graph

    @classmethod
    def from_sparse(cls, edges: Edges, **roles: Any) -> TokenGraph:
        """Build a graph from what `sparsify` returned; `roles` are the keyword arguments of `from_edges`."""
        return cls.from_edges(
            edges.edge_index,
            edges.edge_weight,
            self_weight=edges.self_weight,
            dropped=edges.dropped,
            rule=edges.rule,
            **roles,
        )

    @classmethod
    def from_dense(cls, W: Tensor, *, threshold: float = 0.0, **roles: Any) -> TokenGraph:
        """Build a graph from a dense matrix: every entry strictly above `threshold` becomes an edge.

        Args:
            W: [N, N] float, row = later token (query), column = earlier token (key); zero above the diagonal.
            threshold: weights must be strictly greater to become edges; the loss per row goes to `dropped`.
            roles: `prompt_mask`, `answer_mask` and the other keyword arguments of `from_edges`.
        """
        from flowgraph.rows import DenseRows
        from flowgraph.sparsify import Threshold, sparsify

        return cls.from_sparse(sparsify(DenseRows(W), Threshold(threshold)), **roles)

    def __inc__(self, key: str, value: Any, *args: Any, **kwargs: Any) -> Any:
        # Only these two count tokens. PyG would go by the name and could catch an attribute that users add.
        if key == "pool_index":
            return torch.tensor([[self.num_nodes], [self.num_pools]], device=self.pool_index.device)
        return self.num_nodes if key == "edge_index" else 0

    @property
    def num_pools(self) -> int:
        """M, of the graph or of the whole batch."""
        return self.pools.count

    @property
    def pools(self) -> Pools:
        """The pools and their links."""
        return Pools(self.pool_index, self.pool_weight, self.pool_collects, self.pool_shape)

    @property
    def modelled(self) -> Tensor:
        """[N] how much of `dropped` the pools carry: what each token (target) pays to them."""
        pays = ~self.pool_collects
        paid = torch.zeros_like(self.dropped, dtype=self.pool_weight.dtype)
        return paid.scatter_add_(0, self.pool_index[0][pays], self.pool_weight[pays]).to(self.dropped)

    def validate(self, raise_on_error: bool = True) -> bool:
        """Check every law of a token graph, for one graph or each graph of a batch.

        Raises:
            ValueError: names the broken law, the graph in the batch and the token or edge that breaks it.
        """
        try:
            _check_laws(self)
        except ValueError:
            if raise_on_error:
                raise
            return False
        return True

    def save(self, path: str | Path) -> None:
        """Write the graph as one safetensors file whose header holds the rest as JSON. No pickle is involved."""
        if isinstance(self, Batch):
            raise ValueError("save() takes one graph, got a batch; save each of batch.to_data_list()")
        self.validate()
        about = {"format": FORMAT, "model": self.model, "layers": self.layers, "rule": self.rule}
        tensors = {name: self[name].detach().cpu().contiguous().clone() for name in _TENSORS}
        save_file(tensors, str(path), metadata={"flowgraph": json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path) -> TokenGraph:
        """Read what `save` wrote, bit for bit.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is corrupt, foreign, of another version, or breaks a law; the message says which.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no such file: {path}")
        try:
            with safe_open(str(path), framework="pt") as file:
                header = (file.metadata() or {}).get("flowgraph")
                if header is None:
                    raise ValueError("it is a safetensors file, but not one of FlowGraph")
                about = json.loads(header)
                if not isinstance(about, dict) or about.get("format") != FORMAT:
                    raise ValueError(f"its format is not {FORMAT!r}; write it again with this version of FlowGraph")
                if set(file.keys()) != set(_TENSORS):
                    raise ValueError(f"its tensors are {sorted(file.keys())} instead of {sorted(_TENSORS)}")
                _check_about(about)
                _check_header({name: file.get_slice(name) for name in _TENSORS})
                graph = cls(**{name: file.get_tensor(name) for name in _TENSORS})
            graph.num_nodes = int(graph.prompt_mask.numel())
            graph.model, graph.layers, graph.rule = about["model"], about["layers"], about["rule"]
            graph.validate()
        except (SafetensorError, ValueError, RecursionError) as error:
            raise ValueError(f"cannot load a graph from {path}: {error}") from error
        return graph


def graph_ptr(graph: Data) -> Tensor:
    """[B + 1] where each graph of a batch begins among its tokens; [0, N] for a single graph."""
    ptr = getattr(graph, "ptr", None)
    return torch.tensor([0, graph.num_nodes]) if ptr is None else ptr


def graph_batch(graph: Data) -> Tensor:
    """[N] the number of the graph that each token belongs to; zeros for a single graph."""
    batch = getattr(graph, "batch", None)
    return torch.zeros(graph.num_nodes, dtype=torch.int64, device=graph.edge_index.device) if batch is None else batch


def flow_masks(
    num_tokens: int, prompt_mask: Tensor, answer_mask: Tensor, question_mask: Tensor | None
) -> dict[str, Tensor]:
    """The masks that flow goes by, checked; the question is the prompt, unless it was narrowed."""
    question_mask = prompt_mask if question_mask is None else question_mask
    masks = {"prompt_mask": prompt_mask, "answer_mask": answer_mask, "question_mask": question_mask}
    check_masks(masks, num_tokens)
    return masks


def closed_tokens(prompt_mask: Tensor, answer_mask: Tensor, absorb_at_prompt: bool) -> Tensor:
    """[N] bool, the tokens that flow may not enter: with `absorb_at_prompt` those of the prompt that are no sinks."""
    return prompt_mask & ~answer_mask & absorb_at_prompt


def check_masks(masks: dict[str, Tensor], num_tokens: int) -> None:
    """Raise a ValueError that names the first mask which is no bool tensor [N]."""
    for name, mask in masks.items():
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != (num_tokens,):
            raise ValueError(f"{name} must be a bool tensor of shape [N] = [{num_tokens}], got {_came(mask)}")


_FLOATS = (torch.float32, torch.float64)


def _is(value: Any, shape: tuple[int, ...], *kinds: torch.dtype) -> bool:
    """Is it a tensor of one of these dtypes and of this shape? -1 is any size."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.ndim == len(shape)
        and all(want in (-1, size) for want, size in zip(shape, value.shape, strict=True))
        and value.dtype in kinds
    )


def _came(value: Any) -> str:
    return f"{list(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


def _check_about(about: dict[str, Any]) -> None:
    layers = about.get("layers")
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        raise ValueError(f"layers must be a list of layer numbers, got {reprlib.repr(layers)}")
    for name in ("model", "rule"):
        if not isinstance(about.get(name), str):
            raise ValueError(f"{name} must be text, got {reprlib.repr(about.get(name))}")


def _check_header(slices: dict[str, Any]) -> None:
    """Shapes and dtypes by the header of a file, before a tensor of it is read."""
    shapes = {name: list(one.get_shape()) for name, one in slices.items()}
    tokens, edges, links = (shapes[name][:1] for name in ("prompt_mask", "edge_weight", "pool_weight"))
    sizes = {"edge_index": [2, *edges], "edge_weight": edges, "pool_index": [2, *links]}
    sizes |= {"pool_weight": links, "pool_collects": links}
    for name, one in slices.items():
        wanted = sizes.get(name, tokens)
        whole = name in ("edge_index", "token_ids", "pool_index")
        kinds = ("BOOL",) if name in (*MASKS, "pool_collects") else ("I64",) if whole else ("F32", "F64")
        if shapes[name] != wanted or one.get_dtype() not in kinds:
            came = f"{shapes[name]} {one.get_dtype()}"
            raise ValueError(f"{name} must be {wanted} {' or '.join(kinds)} by the other tensors, got {came}")


def _check_laws(graph: TokenGraph) -> None:
    missing = [name for name in _TENSORS if graph.get(name) is None]
    if missing:
        raise ValueError(f"the graph has no {', '.join(missing)}; build it with TokenGraph.from_edges or from_dense")
    num_tokens, (source, target) = int(graph.num_nodes), graph.edge_index
    weight, ptr, batch = graph.edge_weight, graph_ptr(graph), graph_batch(graph)
    check_masks({name: graph[name] for name in MASKS}, num_tokens)
    for name, kinds in (("token_ids", (torch.int64,)), ("self_weight", _FLOATS), ("dropped", _FLOATS)):
        if not _is(graph[name], (num_tokens,), *kinds):
            allowed = " or ".join(str(kind).removeprefix("torch.") for kind in kinds)
            raise ValueError(f"{name} must have shape [N] = [{num_tokens}], got {_came(graph[name])}; as {allowed}")

    def first(bad: Tensor) -> int:
        return int(bad.nonzero()[0])

    def edge(bad: Tensor) -> str:
        at = first(bad)
        where = int(batch[target[at].clamp(0, num_tokens - 1)])
        start = int(ptr[where])
        return f"graph {where}, edge {int(source[at]) - start} -> {int(target[at]) - start} (number {at} of the batch)"

    sizes = ptr[1:] - ptr[:-1]
    if (bad := sizes < 2).any():
        raise ValueError(
            f"graph {first(bad)} has {int(sizes[first(bad)])} token(s); a trace needs at least a prompt and a response "
            "token"
        )
    if (bad := (graph.edge_index < 0) | (graph.edge_index >= num_tokens)).any():
        raise ValueError(f"edge number {first(bad.any(0))} names a token outside 0..{num_tokens - 1}")
    if (bad := source >= target).any():
        raise ValueError(
            f"{edge(bad)} runs against time; an edge leads from an earlier to a strictly later token "
            "(row 0 of edge_index is the earlier one; row k of a dense W holds what token k attends to)"
        )
    if (bad := batch[source] != batch[target]).any():
        raise ValueError(f"{edge(bad)} joins two graphs of the batch")
    if (bad := ~torch.isfinite(weight)).any():
        raise ValueError(f"{edge(bad)} has weight {float(weight[first(bad)])}; weights must be finite")
    if (bad := weight < 0).any():
        raise ValueError(f"{edge(bad)} has weight {float(weight[first(bad)]):g}; weights must not be negative")
    key = target * num_tokens + source
    if (bad := key[1:] == key[:-1]).any():
        raise ValueError(f"{edge(bad)} occurs twice; add up its weights first (torch_geometric.utils.coalesce)")
    if (bad := key[1:] < key[:-1]).any():
        raise ValueError(f"{edge(bad)} is followed by an earlier one; edges are sorted by target, then source")
    _check_pools(graph, num_tokens, ptr, batch)
    for name in ("self_weight", "dropped"):
        if (bad := ~torch.isfinite(graph[name])).any():
            token = first(bad)
            raise ValueError(
                f"graph {int(batch[token])}: {name} of token {token - int(ptr[batch[token]])} is not finite"
            )
    for law, bad in (
        ("is in the prompt and in the response", graph.prompt_mask & graph.response_mask),
        ("is in question_mask but not in the prompt", graph.question_mask & ~graph.prompt_mask),
        ("is in credit_mask but not in the response", graph.credit_mask & ~graph.response_mask),
    ):
        if bad.any():
            token = first(bad)
            where = int(batch[token])
            raise ValueError(f"graph {where}: token {token - int(ptr[where])} {law}")
    for name in ("question_mask", "response_mask"):
        count = torch.zeros(len(sizes), dtype=torch.int64, device=batch.device).scatter_add_(
            0, batch, graph[name].long()
        )
        if (bad := count == 0).any():
            what = "source: prompt_mask or question_mask is empty" if name == "question_mask" else "response token"
            raise ValueError(f"graph {first(bad)} has no {what}; flow needs both ends of a trace")


def _check_pools(graph: TokenGraph, num_tokens: int, ptr: Tensor, batch: Tensor) -> None:
    index, weight, collects = graph.pool_index, graph.pool_weight, graph.pool_collects
    L = index.shape[-1]
    shapes = [list(tensor.shape) for tensor in (index, weight, collects, graph.pool_shape)]
    dtypes = index.dtype == torch.int64 and weight.is_floating_point() and collects.dtype == torch.bool
    if shapes != [[2, L], [L], [L], [num_tokens]] or not dtypes or not bool(torch.isfinite(graph.pool_shape).all()):
        raise ValueError(
            "pool_index, pool_weight, pool_collects and pool_shape must be [2, L] int64, [L] float, [L] bool and "
            f"finite [N], got {', '.join(map(str, shapes))} with {index.dtype}, {weight.dtype}, {collects.dtype}"
        )
    if L == 0:
        return
    token, pool = index
    if (bad := (token < 0) | (token >= num_tokens) | (pool < 0) | (pool >= L)).any():
        raise ValueError(
            f"pool link number {int(bad.nonzero()[0])} names a token or pool that does not exist (a graph with pools "
            "can't be cut to a part of its tokens)"
        )
    if (bad := ~((weight > 0) & torch.isfinite(weight))).any():
        at = int(bad.nonzero()[0])
        raise ValueError(f"pool link number {at} has weight {float(weight[at])}; weights must be finite and above 0")
    first, last = graph.pools.first_paid, graph.pools.last_collected
    bad = (last < 0) | (first >= num_tokens) | (last >= first)
    bad = bad | (batch[last.clamp(min=0)] != batch[first.clamp(max=num_tokens - 1)])
    if bad.any():
        at = int(bad.nonzero()[0])
        raise ValueError(
            f"pool {at} must collect from earlier tokens of a graph and pay to later ones of the same graph; it "
            f"collects up to token {int(last[at])} of the batch and pays from token {int(first[at])} on"
        )
    if (bad := batch[token] != batch[first[pool]]).any():
        at = int(bad.nonzero()[0])
        raise ValueError(f"pool link number {at} joins token {int(token[at])} to a pool of another graph of the batch")
    # A sparse matrix with the same entry twice is no matrix: solvers differ in what they make of it.
    key = ((pool * 2 + collects) * num_tokens + token).sort().values
    if (bad := key[1:] == key[:-1]).any():
        twice = int(key[1:][bad][0])
        raise ValueError(
            f"the link between token {twice % num_tokens} and pool {twice // num_tokens // 2} occurs twice; add up its "
            "weights first"
        )
    total = weight.new_zeros(len(first)).index_add_(0, pool[collects], weight[collects])
    if (bad := (total - 1).abs() > 1e-3).any():
        at = int(bad.nonzero()[0])
        raise ValueError(f"the shares that pool {at} collects sum to {float(total[at]):g}; they must sum to 1")
    if (first[1:] < first[:-1]).any():
        raise ValueError("pools must be numbered by the first token that they pay to")
