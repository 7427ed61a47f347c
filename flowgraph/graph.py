"""TokenGraph: one reasoning trace as a sparse PyG graph in time order.

Shapes: N tokens, E edges. An edge `i -> k` says that information runs from the earlier token `i` to the later
token `k`, because `k` attends to `i`; its weight is that attention, `W[k, i]`. The diagonal of `W` is no edge.

A `TokenGraph` is an ordinary `torch_geometric.data.Data`: `Batch.from_data_list`, `DataLoader`, `.to(device)` and
`batch[i]` work as for any PyG graph, and every function of FlowGraph takes one graph or a batch of them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch_geometric.data import Batch, Data

if TYPE_CHECKING:
    from flowgraph.sparsify import Edges

FORMAT = "flowgraph/1"
"""Name and version of the file format, in the metadata of every saved graph."""

MASKS = ("prompt_mask", "question_mask", "answer_mask", "response_mask", "credit_mask")
_NODE_TENSORS = (*MASKS, "token_ids", "self_weight", "dropped")
_TENSORS = ("edge_index", "edge_weight", *_NODE_TENSORS)


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

        Raises:
            ValueError: names the argument or the broken law (see `validate`), what came and what to do.
        """
        masks = {"prompt_mask": prompt_mask, "answer_mask": answer_mask}
        masks |= {"question_mask": prompt_mask if question_mask is None else question_mask}
        check_masks(masks, num_tokens=len(prompt_mask))
        response_mask = ~prompt_mask if response_mask is None else response_mask
        credit_mask = response_mask & ~answer_mask if credit_mask is None else credit_mask
        check_masks({"response_mask": response_mask, "credit_mask": credit_mask}, num_tokens=len(prompt_mask))
        if edge_index.ndim != 2 or edge_index.shape[0] != 2 or edge_index.dtype != torch.int64:
            raise ValueError(
                f"edge_index must be [2, E] int64, got {list(edge_index.shape)} {edge_index.dtype}; "
                "row 0 holds the earlier tokens, row 1 the later ones"
            )
        if edge_weight.shape != edge_index.shape[1:] or edge_weight.dtype not in (
            torch.float32,
            torch.float64,
        ):
            raise ValueError(
                f"edge_weight must be [E] = [{edge_index.shape[1]}] float32 or float64, "
                f"got {list(edge_weight.shape)} {edge_weight.dtype}"
            )
        num_tokens = len(prompt_mask)
        key = edge_index[1] * num_tokens + edge_index[0]
        if key.numel() > 1 and not bool((key[1:] > key[:-1]).all()):
            order = torch.argsort(key, stable=True)
            edge_index, edge_weight = edge_index[:, order], edge_weight[order]
        zeros = edge_weight.new_zeros(num_tokens)
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
        # Only edge_index counts tokens. PyG would go by the name and could catch an attribute that users add.
        return self.num_nodes if key == "edge_index" else 0

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
                graph = cls(**{name: file.get_tensor(name) for name in _TENSORS})
            graph.num_nodes = int(graph.prompt_mask.numel())
            graph.model, graph.rule = str(about["model"]), str(about["rule"])
            graph.layers = [int(layer) for layer in about["layers"]]
            graph.validate()
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
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


def check_masks(masks: dict[str, Tensor], num_tokens: int) -> None:
    """Raise a ValueError that names the first mask which is no bool tensor [N]."""
    for name, mask in masks.items():
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != (num_tokens,):
            came = f"{list(mask.shape)} {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"{name} must be a bool tensor of shape [N] = [{num_tokens}], got {came}")


def _check_laws(graph: TokenGraph) -> None:
    missing = [name for name in _TENSORS if graph.get(name) is None]
    if missing:
        raise ValueError(f"the graph has no {', '.join(missing)}; build it with TokenGraph.from_edges or from_dense")
    num_tokens, (source, target) = int(graph.num_nodes), graph.edge_index
    weight, ptr, batch = graph.edge_weight, graph_ptr(graph), graph_batch(graph)
    check_masks({name: graph[name] for name in MASKS}, num_tokens)
    for name in ("token_ids", "self_weight", "dropped"):
        if graph[name].shape != (num_tokens,):
            raise ValueError(f"{name} must have shape [N] = [{num_tokens}], got {list(graph[name].shape)}")

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
