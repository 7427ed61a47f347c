"""Capture equals eager attention for every architecture and layout, and leaves no trace in the model."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import FalconH1Config

from flowgraph import capture, chunks, interface, stream
from flowgraph.capture import Capture, choose_layers, recording, softmax_layers_of, unwrap
from flowgraph.chunks import has_state, refusal
from flowgraph.interface import ModelInUseError, forward
from flowgraph.kernels import attend
from tests.models import ARCHITECTURES, VOCABULARY, Parallel, eager_attention, tiny

B, T = 3, 40
LENGTHS = (31, 40, 37)
DOCUMENTS = (13, 20, 7)
architectures = pytest.mark.parametrize("name", ARCHITECTURES)


def ids() -> Tensor:
    return torch.randint(3, VOCABULARY, (B, T), generator=torch.Generator().manual_seed(1))


def padding(side: str) -> Tensor:
    place = torch.arange(T)
    lengths = torch.tensor(LENGTHS)[:, None]
    return (place >= T - lengths if side == "left" else place < lengths).long()


def dense_rows(captured: Any, row: int, positions: Tensor, block: int | None = 7) -> Tensor:
    """[N, N] what the stream of row blocks holds."""
    N = len(positions)
    W = torch.full((N, N), torch.nan, dtype=torch.float64)
    for start, rows in captured.rows(row, positions, block=block).blocks():
        W[start : start + len(rows)] = 0
        W[start : start + len(rows), : rows.shape[1]] = rows.double()
    return W


@architectures
def test_equals_eager_attention(name: str) -> None:
    model, input_ids = tiny(name), ids()
    captured = capture(model, input_ids, layers="all")
    expected = eager_attention(model, input_ids=input_ids)
    for row in range(B):
        assert (dense_rows(captured, row, torch.arange(T)) - expected[row]).abs().max() < 1e-5


@architectures
@pytest.mark.parametrize("side", ["left", "right"])
def test_equals_eager_attention_with_pads(name: str, side: str) -> None:
    model, input_ids, mask = tiny(name), ids(), padding(side)
    captured = capture(model, input_ids, mask, layers="all")
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = eager_attention(model, input_ids=input_ids, attention_mask=mask, position_ids=position_ids)
    for row in range(B):
        real = mask[row].nonzero().flatten()
        assert (dense_rows(captured, row, real) - expected[row][real][:, real]).abs().max() < 1e-5


@architectures
def test_packed_documents_equal_the_documents_alone(name: str) -> None:
    if name == "qwen3_5":
        pytest.skip("its linear layers carry state from one packed document into the next, whatever the attention does")
    model, input_ids = tiny(name), ids()[:1]
    position_ids = torch.cat([torch.arange(n) for n in DOCUMENTS])[None]
    captured = capture(model, input_ids, position_ids=position_ids, layers="all")
    start = 0
    for length in DOCUMENTS:
        place = torch.arange(start, start + length)
        alone = eager_attention(model, input_ids=input_ids[:, place])
        assert (dense_rows(captured, 0, place) - alone[0]).abs().max() < 1e-5
        start += length


@pytest.mark.filterwarnings("ignore:.*carry their state")
def test_packed_hybrid_equals_its_own_eager_attention() -> None:
    model, input_ids = tiny("qwen3_5"), ids()[:1]
    position_ids = torch.cat([torch.arange(n) for n in DOCUMENTS])[None]
    captured = capture(model, input_ids, position_ids=position_ids)
    expected = eager_attention(model, input_ids=input_ids, position_ids=position_ids)[0]
    place = torch.arange(13, 33)
    assert (dense_rows(captured, 0, place) - expected[place][:, place]).abs().max() < 1e-5


def test_packed_with_pads_at_the_end() -> None:
    model, input_ids = tiny("mistral"), ids()[:1]
    position_ids = torch.cat([torch.arange(13), torch.arange(20), torch.zeros(7, dtype=torch.long)])[None]
    mask = (torch.arange(T) < 33).long()[None]
    captured = capture(model, input_ids, mask, position_ids, layers="all")
    alone = eager_attention(model, input_ids=input_ids[:, 13:33])
    assert (dense_rows(captured, 0, torch.arange(13, 33)) - alone[0]).abs().max() < 1e-5


@architectures
def test_bfloat16_is_within_two_percent(name: str) -> None:
    model, input_ids = tiny(name).bfloat16(), ids()
    captured = capture(model, input_ids, layers="all")
    expected = eager_attention(model, input_ids=input_ids)
    for row in range(B):
        W = dense_rows(captured, row, torch.arange(T))
        assert (W - expected[row]).norm() / expected[row].norm() < 2e-2


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gemma3", "qwen3_5"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_the_pass_itself_is_the_models_own(
    name: str, implementation: str, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What enters the deepest layer equals the q of a plain forward: nothing before it was computed differently."""
    monkeypatch.setattr(interface, "_QUERY_CHUNK", 16)  # kernels with an explicit mask run in several chunks
    model, input_ids = tiny(name, implementation), ids()
    mask = None if side == "none" else padding(side)
    deepest = softmax_layers_of(model, input_ids)[-1]
    seen: list[Tensor] = []
    attention = model.model.layers[deepest].self_attn
    hook = attention.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
    )
    position_ids = {} if mask is None else {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0), "attention_mask": mask}
    with torch.no_grad():
        model(input_ids, **position_ids, use_cache=False)
        capture(model, input_ids, mask, layers=[deepest])
    hook.remove()
    plain, ours = seen
    real = torch.ones(B, T, dtype=torch.bool) if mask is None else mask.bool()
    assert (plain - ours)[real].abs().max() < 1e-5


def test_a_padded_row_equals_the_row_alone() -> None:
    model, input_ids, mask = tiny("llama"), ids(), padding("left")
    captured = capture(model, input_ids, mask)
    real = mask[0].nonzero().flatten()
    alone = capture(model, input_ids[:1, real])
    difference = dense_rows(captured, 0, real) - dense_rows(alone, 0, torch.arange(len(real)))
    assert difference.abs().max() < 1e-5


def test_pads_in_the_middle_keep_their_distance() -> None:
    """A sliding window counts places in the sequence that the model saw, pads included."""
    model, input_ids = tiny("mistral"), ids()[:1]
    mask = torch.ones(1, T, dtype=torch.long)
    mask[0, 15:19] = 0
    position_ids = torch.arange(T)[None]
    captured = capture(model, input_ids, mask, position_ids, layers="all")
    expected = eager_attention(model, input_ids=input_ids, attention_mask=mask, position_ids=position_ids)[0]
    real = mask[0].nonzero().flatten()
    assert (dense_rows(captured, 0, real) - expected[real][:, real]).abs().max() < 1e-5


@pytest.mark.parametrize("block", [1, 3, 40, 64, None])
def test_the_size_of_blocks_does_not_matter(block: int | None) -> None:
    model, input_ids = tiny("gpt_oss"), ids()
    captured = capture(model, input_ids)
    whole = dense_rows(captured, 1, torch.arange(T), block=T)
    assert (dense_rows(captured, 1, torch.arange(T), block=block) - whole).abs().max() < 1e-6


def state_of(model: Any) -> tuple[Any, ...]:
    modules = list(model.modules())
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in modules)
    configs = [m.config._attn_implementation for m in modules if hasattr(m, "config")]
    return hooks, configs, [m.training for m in modules], model.config.to_json_string(), len(modules)


@architectures
@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_left_as_it_was(name: str, training: bool) -> None:
    model, input_ids = tiny(name), ids()
    with torch.no_grad():
        logits = model(input_ids).logits
    model.train(training)
    model.model.layers[0].eval()  # mixed modes come back as they were
    before = state_of(model)
    capture(model, input_ids, padding("left"))
    assert state_of(model) == before
    with pytest.raises(IndexError):
        capture(model, input_ids + VOCABULARY)  # token ids beyond the embedding: an exception inside the model
    assert state_of(model) == before
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(input_ids).logits, logits)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_exception_in_the_deepest_layers_leaves_the_model_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, input_ids = tiny("llama"), ids()
    before = state_of(model)

    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("kernel died")

    softmax_layers_of(model, input_ids)
    monkeypatch.setattr(interface, "_run_kernel", broken)
    with pytest.raises(RuntimeError, match="kernel died"):
        capture(model, input_ids)
    assert state_of(model) == before


def test_layers_above_the_deepest_chosen_one_and_the_head_do_not_run() -> None:
    model, input_ids = tiny("llama"), ids()
    softmax_layers_of(model, input_ids)
    ran: list[str] = []
    watched = {f"layer {n}": layer for n, layer in enumerate(model.model.layers)} | {"head": model.lm_head}
    for name, module in watched.items():
        module.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    assert capture(model, input_ids, layers=[0, 2]).layers == [0, 2]
    assert ran == ["layer 0", "layer 1", "layer 2"]


def test_no_tensor_of_n_by_n_is_held() -> None:
    """Every tensor made from the capture on is counted: none has N * N elements, though N is small against H * D."""
    model = tiny("mistral", max_position_embeddings=2048)
    N = 2048
    input_ids = torch.randint(3, VOCABULARY, (1, N))
    mask = torch.ones(1, N, dtype=torch.long)
    mask[0, :5] = 0
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, Tensor):
                    largest = max(largest, tensor.untyped_storage().nbytes() // tensor.element_size())
            return out

    with Watch():
        captured = capture(model, input_ids, mask)
        for _ in captured.rows(0, torch.arange(5, N), block=64).blocks():
            pass
    assert largest < N * N


def test_choice_of_layers() -> None:
    softmax = list(range(30))
    assert choose_layers(softmax, "middle") == list(range(10, 20))
    assert choose_layers([0], "middle") == [0]
    assert choose_layers([0, 1], "middle") == [0]
    assert choose_layers([3, 7, 11, 15], "middle") == [7]
    assert choose_layers([3, 7, 11], "all") == [3, 7, 11]
    assert choose_layers([3, 7, 11], [-1, 3]) == [3, 11]
    assert choose_layers(softmax, range(2, 4)) == [2, 3]


def test_hybrid_model_reads_its_softmax_layers_only() -> None:
    model, input_ids = tiny("qwen3_5"), ids()
    assert capture(model, input_ids, layers="all").layers == [3]
    with pytest.raises(ValueError, match=r"layers \[0, 2\] have no softmax attention.*that have: \[3\]"):
        capture(model, input_ids, layers=[0, 2, 3])


@pytest.mark.parametrize("layers", ["last", [], [1.5], None])
def test_nonsense_for_layers_is_refused(layers: Any) -> None:
    with pytest.raises(ValueError, match='layers must be "middle", "all" or a list of layer numbers'):
        capture(tiny("llama"), ids(), layers=layers)


def test_models_without_the_interface_are_refused() -> None:
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=2)).eval()
    with pytest.raises(ValueError, match=r"BloomForCausalLM does not use the attention interface.*from_dense"):
        capture(model, ids())
    assert model.config._attn_implementation != "flowgraph"


def test_encoders_are_refused() -> None:
    from transformers import BertConfig, BertLMHeadModel

    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48}
    sizes |= {"num_hidden_layers": 3, "num_attention_heads": 4, "pad_token_id": 0}
    with pytest.raises(ValueError, match="layer 0, BertSelfAttention lets tokens see later ones"):
        capture(BertLMHeadModel(BertConfig(**sizes)), ids())
    assert capture(BertLMHeadModel(BertConfig(**sizes, is_decoder=True)), ids()).layers == [1]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_models_that_put_tokens_before_the_input_are_refused(kind: str) -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=5)
    model = peft.get_peft_model(tiny("llama"), config).eval()
    for chunk in (None, 16):
        with pytest.raises(ValueError, match="puts 5 tokens of its own before the input in layer"):
            capture(model, ids(), chunk=chunk)
        with pytest.raises(ValueError, match="puts 5 tokens of its own before the input in layer"):
            next(stream(model, ids()[:1], chunk=chunk or 100).blocks())


def test_wrappers_come_off_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", Parallel)
    model = tiny("llama")

    def compiled(inner: torch.nn.Module) -> Any:
        return torch.compile(inner, backend="eager")

    for wrapped in (Parallel(model), compiled(model), Parallel(compiled(model)), compiled(Parallel(model))):
        assert unwrap(wrapped) is model and capture(wrapped, ids()).shape == (B, T)


def test_which_models_keep_a_state() -> None:
    """Beside keys and values, or in their place; and a kind of layer without a cache is no reason to fail."""
    assert [has_state(tiny(name)) for name in ("llama", "mistral", "qwen3_5")] == [False, False, True]
    both = SimpleNamespace(config=FalconH1Config(num_hidden_layers=2))
    assert has_state(both)
    odd = tiny("llama")
    odd.config.layer_types = ["attention"] * odd.config.num_hidden_layers
    assert not has_state(odd)


def test_a_model_in_use_is_not_taken_for_one_without_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    with recording(model), pytest.raises(RuntimeError, match="is being read already"):
        refusal(model)
    passes = iter([forward, in_use])
    monkeypatch.setattr(chunks, "forward", lambda *args: next(passes)(*args))
    with pytest.raises(RuntimeError, match="busy"):
        refusal(model)
    monkeypatch.undo()
    assert refusal(model) is None


def in_use(*args: Any) -> None:
    raise ModelInUseError("busy")


def test_packed_documents_of_a_hybrid_are_warned_of() -> None:
    input_ids, position_ids = ids()[:1], torch.cat([torch.arange(n) for n in DOCUMENTS])[None]
    with pytest.warns(UserWarning, match="carry their state from one packed document into the next"):
        capture(tiny("qwen3_5"), input_ids, position_ids=position_ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        capture(tiny("llama"), input_ids, position_ids=position_ids)
        capture(tiny("qwen3_5"), input_ids)


def test_what_another_thread_is_told_while_a_model_is_read() -> None:
    model, input_ids = tiny("llama"), ids()
    twin = type(model)(model.config).eval()  # shares the configuration
    model.train()
    said: list[str] = []

    def elsewhere(use: Callable[[], Any]) -> None:
        def run() -> None:
            try:
                use()
            except RuntimeError as error:
                said.append(str(error))

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()

    def meanwhile(*_: Any) -> None:
        assert not model.training
        for one in (model, twin):
            elsewhere(partial(one, input_ids))
            elsewhere(partial(capture, one, input_ids))
        assert not model.training  # the reading goes on in the mode that it began in

    softmax_layers_of(model, input_ids), softmax_layers_of(twin, input_ids)
    hook = model.model.layers[0].register_forward_pre_hook(meanwhile)
    capture(model, input_ids)
    hook.remove()
    assert len(said) == 4 and all("use a lock, or a copy of the model" in one for one in said)
    assert "another thread is tracing it, or one that shares its config" in said[0]
    assert model.training and capture(twin, input_ids).shape == (B, T)


def test_compiled_models_are_read_uncompiled() -> None:
    model, input_ids = tiny("llama"), ids()
    compiled = torch.compile(model)
    ours, plain = capture(compiled, input_ids), capture(model, input_ids)  # type: ignore[arg-type]
    assert torch.equal(dense_rows(ours, 0, torch.arange(T)), dense_rows(plain, 0, torch.arange(T)))


def test_the_same_inputs_give_the_same_bits() -> None:
    model, input_ids = tiny("gemma3"), ids()
    first, second = (dense_rows(capture(model, input_ids), 2, torch.arange(T), None) for _ in range(2))
    assert torch.equal(first, second)


# --- log-sum-exp from the model's own attention call -----------------------------------------------------------------


def dense_log_sum(kept: Any, row: int, real: Tensor) -> Tensor:
    """[H, N] float64 over the scores of the real tokens of a row, as the mask function has them see each other."""
    query, key = kept.query[row].double()[:, real], kept.key[row].double()[:, real]
    scores = query @ key.repeat_interleave(len(query) // len(key), dim=0).mT * kept.scaling
    visible = kept.mask.function(torch.tensor(row), torch.tensor(0), real[:, None], real[None, :])
    return scores.masked_fill(~visible, -torch.inf).logsumexp(-1)


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma3"])
@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("how", ["capture", "chunks", "recording"])
def test_log_sums_of_sdpa_equal_a_dense_computation(name: str, side: str, how: str) -> None:
    model, input_ids = tiny(name), ids()
    mask = None if side == "none" else padding(side)
    if how == "recording":
        with torch.no_grad(), recording(model, layers=[1, 2, 5]) as captures:
            model(input_ids, attention_mask=mask)
        (captured,) = captures
    else:
        captured = capture(model, input_ids, mask, layers=[1, 2, 5], chunk=9 if how == "chunks" else None)
    # The pass of a capture ends in the deepest layer before its attention runs.
    assert [kept.log_sum is None for kept in captured._kept] == [False, False, how != "recording"]
    for kept in captured._kept:
        for row in range(B):
            if kept.log_sum is None:
                continue
            real = torch.arange(T) if mask is None else mask[row].nonzero().flatten()
            assert (kept.log_sum[row][:, real] - dense_log_sum(kept, row, real)).abs().max() < 1e-5


@pytest.mark.parametrize(("name", "implementation"), [("llama", "eager"), ("gemma2", "eager"), ("gpt_oss", "eager")])
def test_no_log_sums_from_eager_attention(name: str, implementation: str) -> None:
    captured = capture(tiny(name, implementation), ids(), layers="all")
    assert all(kept.log_sum is None for kept in captured._kept)


def test_layers_that_are_not_chosen_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, input_ids = tiny("llama"), ids()
    softmax_layers_of(model, input_ids)
    calls: list[Any] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return attend(*args, **kwargs)

    monkeypatch.setattr("flowgraph.kernels.attend", counted)
    with torch.no_grad(), recording(model, layers=[1, 4]):
        model(input_ids)
    assert len(calls) == 2


def test_a_trace_that_is_less_than_its_row_gets_no_log_sum_of_the_row() -> None:
    """The rows of some tokens are normalised over these; so are packed documents, whose own log-sum-exp is at hand."""
    model, input_ids = tiny("llama"), ids()[:1]
    captured, some = capture(model, input_ids, layers="all"), torch.tensor([3, 4, 5, 9, 10, 30])
    assert (dense_rows(captured, 0, some).sum(1) - 1).abs().max() < 1e-6
    assert captured._kept[0].mask.sees_only(0, torch.arange(20))
    assert not captured._kept[0].mask.sees_only(0, torch.arange(1, 20))
    position_ids = torch.cat([torch.arange(n) for n in DOCUMENTS])[None]
    mask = capture(model, input_ids, position_ids=position_ids)._kept[0].mask
    assert mask.sees_only(0, torch.arange(13, 33)) and not mask.sees_only(0, torch.arange(14, 33))
    padded = capture(model, ids(), padding("left"))._kept[0].mask
    assert padded.sees_only(0, torch.arange(9, T)) and not padded.sees_only(0, torch.arange(10, T))


# --- prefill by chunks -----------------------------------------------------------------------------------------------


@architectures
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_chunks_equal_one_pass(name: str, side: str) -> None:
    model, input_ids = tiny(name), ids()
    mask = None if side == "none" else padding(side)
    whole = capture(model, input_ids, mask, layers="all", values=True)
    for chunk, offload in ((3, False), (7, True), (39, False), (T, True), (1000, False)):
        parts = capture(model, input_ids, mask, layers="all", values=True, chunk=chunk, offload=offload)
        assert parts.shape == whole.shape and parts.layers == whole.layers and parts.device == whole.device
        for row in range(B):
            real = torch.arange(T) if mask is None else mask[row].nonzero().flatten()
            assert (dense_rows(parts, row, real) - dense_rows(whole, row, real)).abs().max() < 1e-5
            for ours, theirs in zip(parts._kept, whole._kept, strict=True):
                assert ours.key.shape == theirs.key.shape and ours.query.shape == theirs.query.shape
                for name_of_one in ("query", "key", "value_norm"):
                    difference = getattr(ours, name_of_one)[row] - getattr(theirs, name_of_one)[row]
                    assert difference[:, real].abs().max() < 1e-4


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_chunks_equal_one_pass_in_a_small_and_a_large_mask(
    implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The queries of a chunk go to a kernel with a mask a few at a time."""
    monkeypatch.setattr(interface, "_QUERY_CHUNK", 5)
    for name in ("llama", "mistral", "gemma3"):
        model = tiny(name, implementation)
        whole, parts = (capture(model, ids(), padding("left"), layers=[5], chunk=chunk) for chunk in (None, 18))
        real = padding("left")[0].nonzero().flatten()
        assert (dense_rows(parts, 0, real) - dense_rows(whole, 0, real)).abs().max() < 1e-5


def test_chunks_leave_the_model_as_it_was() -> None:
    model, input_ids = tiny("gemma3").train(), ids()
    before = state_of(model)
    capture(model, input_ids, padding("left"), chunk=9, offload=True, values=True)
    assert state_of(model) == before
    hook = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        capture(model, input_ids, chunk=9)
    hook.remove()
    assert state_of(model) == before


def test_chunks_run_no_layer_above_the_deepest_chosen_one() -> None:
    model, input_ids = tiny("llama"), ids()
    assert refusal(model) is None
    ran: list[tuple[int, int]] = []
    for number, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda _, args, number=number: ran.append((number, args[0].shape[1])))
    capture(model, input_ids, layers=[1], chunk=16)
    assert ran == [(0, 16), (1, 16), (0, 16), (1, 16), (0, 8), (1, 8)]


def test_what_chunks_refuse() -> None:
    model, input_ids = tiny("llama"), ids()
    for wrong in (0, 1, 2.5):
        with pytest.raises(ValueError, match="chunk must be a number of tokens, 2 or more"):
            capture(model, input_ids, chunk=wrong)  # type: ignore[arg-type]
    position_ids = torch.cat([torch.arange(n) for n in DOCUMENTS])[None]
    with pytest.raises(ValueError, match=r"don't go up by one at \[0, 13\].*a row of its own"):
        capture(model, input_ids[:1], position_ids=position_ids, chunk=16)


def jamba() -> Any:
    """Its linear layers start anew with every chunk of more than one token."""
    from transformers import JambaConfig, JambaForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
    }
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 2, "num_experts_per_tok": 1}
    sizes |= {"attn_layer_period": 3, "attn_layer_offset": 2, "mamba_d_state": 8, "mamba_dt_rank": 4}
    torch.manual_seed(7)
    return JambaForCausalLM(JambaConfig(**sizes)).eval()


def test_a_hybrid_that_forgets_its_state_cannot_be_read_by_chunks() -> None:
    model = jamba()
    with pytest.raises(ValueError, match=r"JambaForCausalLM gives other keys by chunks.*pass chunk=None"):
        capture(model, ids(), layers="all", chunk=16)
    assert capture(model, ids(), layers="all", chunk=T).layers == [2]


def test_a_model_that_forgets_its_cache_cannot_be_read_by_chunks() -> None:
    model, input_ids = tiny("llama"), ids()
    for layer in model.model.layers:
        plain = layer.self_attn.forward
        layer.self_attn.forward = lambda *args, plain=plain, **kw: plain(*args, **(kw | {"past_key_values": None}))
    with pytest.raises(ValueError, match=r"layers \[0, .*\] of LlamaForCausalLM saw nothing but .* pass chunk=None"):
        capture(model, input_ids, chunk=16)


def test_a_model_that_wants_a_cache_of_its_own_kind_cannot_be_read_by_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    plain = model.forward

    def picky(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("past_key_values") is not None:
            raise TypeError("not this cache")
        return plain(*args, **kwargs)

    monkeypatch.setattr(model, "forward", picky)
    with pytest.raises(ValueError, match=r"doesn't go on from a cache \(TypeError: not this cache\): pass chunk=None"):
        capture(model, ids(), chunk=16)
    assert capture(model, ids()).shape == (B, T)


# --- recording: in a forward pass that runs anyway -------------------------------------------------------------------


@architectures
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_recording_changes_no_bit_of_the_outputs(name: str, implementation: str, side: str) -> None:
    model, input_ids = tiny(name, implementation), ids()
    mask = None if side == "none" else padding(side)
    with torch.no_grad():
        plain = model(input_ids, attention_mask=mask).logits
        with recording(model, layers="all") as captures:
            recorded = model(input_ids, attention_mask=mask).logits
    assert torch.equal(plain, recorded)
    ours, theirs = captures[0], capture(model, input_ids, mask, layers="all")
    assert ours.layers == theirs.layers and ours.shape == theirs.shape == (B, T)
    for row in range(B):
        real = torch.arange(T) if mask is None else mask[row].nonzero().flatten()
        assert (dense_rows(ours, row, real) - dense_rows(theirs, row, real)).abs().max() < 1e-5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile", "ignore:_compile flag")
def test_recording_keeps_a_kernel_with_a_mask_of_its_own_kind() -> None:
    model, input_ids, mask = tiny("llama", "flex_attention"), ids(), padding("left")
    with torch.no_grad():
        plain = model(input_ids, attention_mask=mask).logits
        with recording(model) as captures:
            assert torch.equal(model(input_ids, attention_mask=mask).logits, plain)
    assert len(captures) == 1 and model.config._attn_implementation == "flex_attention"


def test_recording_keeps_dropout_and_the_mode() -> None:
    model, input_ids = tiny("llama", attention_dropout=0.5).train(), ids()
    with torch.no_grad():
        torch.manual_seed(3)
        plain = model(input_ids).logits
        with recording(model):
            torch.manual_seed(3)
            assert torch.equal(model(input_ids).logits, plain)
    assert model.training


def test_recording_gives_one_capture_per_pass() -> None:
    model, input_ids = tiny("llama"), ids()
    with torch.no_grad(), recording(model, layers=[1, 3]) as captures:
        for row in range(B):
            model(input_ids[row : row + 1, : T - row])
    assert [one.shape for one in captures] == [(1, T), (1, T - 1), (1, T - 2)]
    for row, one in enumerate(captures):
        alone = capture(model, input_ids[row : row + 1, : T - row], layers=[1, 3])
        place = torch.arange(T - row)
        assert (dense_rows(one, 0, place) - dense_rows(alone, 0, place)).abs().max() < 1e-6


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_some_rows_of_a_capture(name: str) -> None:
    captured = capture(tiny(name), ids(), padding("left"))
    some = captured.select([2, 0])
    assert some.shape == (2, T) and some.select([1]).shape == (1, T)
    for row, whole in ((0, 2), (1, 0)):
        real = padding("left")[whole].nonzero().flatten()
        assert torch.equal(dense_rows(some, row, real), dense_rows(captured, whole, real))
    assert torch.equal(dense_rows(some.select([1]), 0, real), dense_rows(captured, 0, real))


def test_a_capture_is_handed_over_before_the_pass_ends_and_then_forgotten() -> None:
    model, input_ids = tiny("llama"), ids()
    softmax_layers_of(model, input_ids)
    events: list[str] = []
    model.model.layers[3].register_forward_hook(lambda *_: events.append("layer 3"))
    alive: list[weakref.ref[Tensor]] = []

    def take(captured: Capture) -> None:
        events.append("captured")
        alive.append(weakref.ref(captured._kept[0].query))

    def look(*_: Any) -> None:
        events.append(f"{sum(one() is not None for one in alive)} alive at the head")

    model.lm_head.register_forward_pre_hook(look)
    with torch.no_grad(), recording(model, layers=[1, 3], on_capture=take) as captures:
        model(input_ids)
        model(input_ids)
    assert captures == [] and events == ["captured", "layer 3", "0 alive at the head"] * 2


def test_recording_with_autocast_hands_over_without_it() -> None:
    model, input_ids = tiny("llama"), ids()
    seen: list[bool] = []
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        plain = model(input_ids).logits
        with recording(model, on_capture=lambda _: seen.append(torch.is_autocast_enabled("cpu"))):
            assert torch.equal(model(input_ids).logits, plain)
        assert torch.is_autocast_enabled("cpu")
    assert seen == [False]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_recording_works_through_wrappers() -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    model, input_ids = tiny("llama"), ids()
    place = torch.arange(T)
    expected = dense_rows(capture(model, input_ids), 1, place)

    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.inner(*args, **kwargs)

    with torch.no_grad():
        with recording(model) as captures:
            Wrapped()(input_ids)
        assert (dense_rows(captures[0], 1, place) - expected).abs().max() < 1e-6
        lora = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
        with recording(lora) as captures:
            lora(input_ids=input_ids)
        assert (dense_rows(captures[0], 1, place) - expected).abs().max() < 1e-6


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
def test_recording_a_compiled_model() -> None:
    model, input_ids = tiny("llama"), ids()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        plain = compiled(input_ids).logits
        with recording(compiled) as captures:  # type: ignore[arg-type]
            recorded = compiled(input_ids).logits
        assert torch.equal(compiled(input_ids).logits, plain)
    assert len(captures) == 1 and torch.equal(recorded, plain)


def test_a_model_that_shares_the_configuration_is_not_recorded() -> None:
    model, input_ids = tiny("llama"), ids()
    other = type(model)(model.config).eval()
    assert other.config is model.config
    with torch.no_grad():
        plain = other(input_ids, attention_mask=padding("left")).logits
        with recording(model) as captures:
            assert torch.equal(other(input_ids, attention_mask=padding("left")).logits, plain)
    assert captures == []


@architectures
def test_recording_leaves_the_model_as_it_was(name: str) -> None:
    model, input_ids = tiny(name), ids()
    before = state_of(model)
    with torch.no_grad(), recording(model):
        model(input_ids, attention_mask=padding("left"))
    assert state_of(model) == before
    with pytest.raises(KeyError, match="caller"), recording(model):
        raise KeyError("caller")
    assert state_of(model) == before
    model(input_ids).logits.sum().backward()  # gradients work again


def test_an_exception_while_recording_leaves_the_next_pass_clean() -> None:
    model, input_ids = tiny("llama"), ids()
    with torch.no_grad(), recording(model, layers=[0, 4]) as captures:
        hook = model.model.layers[2].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(input_ids[:1])
        hook.remove()
        model(input_ids)
    assert [one.shape for one in captures] == [(B, T)]


def test_what_recording_refuses() -> None:
    model, input_ids = tiny("llama"), ids()
    with recording(model), pytest.raises(RuntimeError, match="without gradients only"):
        model(input_ids)
    with torch.no_grad(), recording(model), pytest.raises(ValueError, match="1 queries for 41 keys"):
        cache = model(input_ids, use_cache=True).past_key_values
        model(input_ids[:, :1], past_key_values=cache)
    with recording(model), pytest.raises(RuntimeError, match="read already"), recording(model):
        pass
    with recording(model), pytest.raises(RuntimeError, match="read already"):
        capture(model, input_ids)
    with pytest.raises(ValueError, match=r"layers \[99\] have no softmax attention"), recording(model, layers=[99]):
        pass


def test_layers_on_several_devices_are_refused() -> None:
    """A model that is spread over GPUs; the second device is one that any machine has."""
    captured = capture(tiny("llama"), torch.arange(8)[None])
    far = [replace(kept, query=kept.query.to("meta")) for kept in captured._kept]
    with pytest.raises(ValueError, match=r"several devices \(layer 2 on cpu, layer 3 on meta\)"):
        Capture("spread", [2, 3], [captured._kept[0], far[1]])
