"""Where the answer is in a text, in tokens, and which tokens are its sinks."""

from __future__ import annotations

import re
import string
import time
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from flowgraph import smollm2
from flowgraph.answers import FINDERS, find_answer
from flowgraph.spans import (
    PRESETS,
    Encoded,
    encode_messages,
    encode_text,
    locate,
    question_of_messages,
    sinks_of,
    token_offsets,
    tokens_of,
)
from tests.written import TOKENIZER

CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = [
    "The answer is 42. Tom has 3 apples and buys 4 more, so 3 + 4 = 7 apples.",
    "Thus $x = \\boxed{\\frac{1}{2}}$ and the final answer is 1/2.",
    "#### 12\n\nA: 5\n<answer>9</answer>\n  spaces    and\ttabs",
    "naïve café 你好世界 שלום 😀",
]
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


def byte_level() -> PreTrainedTokenizerFast:
    """GPT-2 style: characters outside ASCII are split over several tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def metaspace() -> PreTrainedTokenizerFast:
    """Llama-2 style: blanks are a sign of their own, unknown characters fall back to bytes."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for piece in ["▁", *string.ascii_letters, *string.digits, *".,:$#+=<>/\\{}", "é", "你"]:
        vocab[piece] = len(vocab)
    merges = [
        ("▁", "t"),
        ("h", "e"),
        ("▁t", "he"),
        ("▁", "▁"),
        ("i", "s"),
        ("▁", "is"),
        ("1", "2"),
        ("▁", "1"),
    ]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<s>", "</s>")])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def wordpiece() -> PreTrainedTokenizerFast:
    """BERT style: blanks are in no token, the decoder puts them back and glues punctuation."""
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    specials = ["[UNK]", "[CLS]", "[SEP]", "[PAD]"]
    core.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=specials, show_progress=False)
    )
    names = dict(zip(("unk_token", "cls_token", "sep_token", "pad_token"), specials, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


BUILT = {"byte_level": byte_level, "metaspace": metaspace, "wordpiece": wordpiece}


def load(name: str) -> Any:
    if name != "smollm2":
        return BUILT[name]()
    return AutoTokenizer.from_pretrained(smollm2.folder(), local_files_only=True)


@pytest.fixture(scope="session", params=["smollm2", *BUILT])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return load(request.param)


@pytest.fixture(scope="session", params=["smollm2", "byte_level"])
def chat(request: pytest.FixtureRequest) -> Any:
    """Tokenizers with a chat template."""
    return load(request.param)


@pytest.fixture(scope="session")
def small() -> Any:
    return byte_level()


def decoded(tokenizer: Any, ids: Any) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


# ------------------------------------------------------------------------- finders

CASES = [
    # finder, text, answer, flags
    ("boxed", r"so $\boxed{42}$.", "42", ()),
    ("boxed", r"\boxed {42}", "42", ()),
    ("boxed", r"\fbox{ 7 }", "7", ()),
    ("boxed", r"\\boxed{7}", "7", ()),
    ("boxed", r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", ()),
    ("boxed", r"\boxed{\text{(B) } x^{2^{n}}}", r"\text{(B) } x^{2^{n}}", ()),
    ("boxed", r"\boxed{\left\{1, 2\right\}}", r"\left\{1, 2\right\}", ()),
    ("boxed", r"\boxed{\}}", r"\}", ()),
    ("boxed", "\\boxed{\n 3.5.\n}", "3.5", ()),
    ("boxed", r"the set {1, 2 and \boxed{3}", "3", ()),
    ("boxed", r"}} \boxed{3}", "3", ()),
    ("boxed", r"\boxed{\boxed{3}}", "3", ()),
    ("boxed", r"\boxed{1} no: \boxed{2}", "2", ("several_answers",)),
    ("boxed", r"\boxed{你好 😀}", "你好 😀", ()),
    ("boxed", r"\boxed{}", None, ("no_answer",)),
    ("boxed", r"\boxed{ ... }", None, ("no_answer",)),
    ("boxed", r"\boxed 12", None, ("no_answer",)),
    ("boxed", r"\unboxed{12}", None, ("no_answer",)),
    ("boxed", r"\boxed{12", None, ("no_answer", "cut_off")),
    ("boxed", r"\boxed{\frac{1}{2}", None, ("no_answer", "cut_off")),
    ("boxed", r"\boxed{1} so \boxed{12", "1", ("cut_off",)),
    ("boxed", r"\boxed{1 so \boxed{12}", "12", ("cut_off",)),
    ("boxed", r"\boxed{1} \boxed{2} \boxed{", "2", ("cut_off", "several_answers")),
    ("####", "3 + 4 = 7\n#### 7", "7", ()),
    ("####", "####7", "7", ()),
    ("####", "#### $1,234.50.\nDone.", "$1,234.50", ()),
    ("####", "#### -5\r\nbye", "-5", ()),
    ("####", "#### 1\n#### 2", "2", ("several_answers",)),
    ("####", "#### 1 #### 2", "2", ("several_answers",)),
    ("####", "#### 10 apples  \n", "10 apples", ()),
    ("####", "##### heading", None, ("no_answer",)),
    ("####", "### 7", None, ("no_answer",)),
    ("####", "####\n7", None, ("no_answer",)),
    ("####", "so\n####", None, ("no_answer", "cut_off")),
    ("####", "so\n#### \n", None, ("no_answer", "cut_off")),
    ("####", "#### 1\n####", "1", ("cut_off",)),
    ("A:", "Q: 2+3?\nA: 5", "5", ()),
    ("A:", "  A: 5 apples.", "5 apples", ()),
    ("A:", "**A:** 5", "5", ()),
    ("A:", "A: 5\nQ: 1+1?\nA: 2\n", "2", ("several_answers",)),
    ("A:", "Plan A: 5", None, ("no_answer",)),
    ("A:", "USA: 5", None, ("no_answer",)),
    ("A:", "a: 5", None, ("no_answer",)),
    ("A:", "Answer: 5", None, ("no_answer",)),
    ("A:", "Q: x?\nA:", None, ("no_answer", "cut_off")),
    ("A:", "A: 5\nA: ", "5", ("cut_off",)),
    ("<answer>", "<think>x</think><answer>42</answer>", "42", ()),
    ("<answer>", "<ANSWER>\n 42.\n</Answer>", "42", ()),
    ("<answer>", "<answer>1</answer><answer>2</answer>", "2", ("several_answers",)),
    ("<answer>", "use <answer> tags: <answer>2</answer>", "2", ()),
    ("<answer>", "</answer> 3", None, ("no_answer",)),
    ("<answer>", "<answer> </answer>", None, ("no_answer",)),
    ("<answer>", "<answer>12", None, ("no_answer", "cut_off")),
    ("<answer>", "<answer>1</answer><answer>12</ans", "1", ("cut_off",)),
    ("answer is", "The answer is 42.", "42", ()),
    ("answer is", "the final answer is: $42$.", "42", ()),
    ("answer is", "The Answer is **42** apples. Good.", "42", ()),
    ("answer is", "**The answer is:** 42", "42", ()),
    ("answer is", "**The answer is 42.**", "42", ()),
    ("answer is", "**The answer is: 42**", "42", ()),
    ("answer is", "The answer is **$42$**.", "42", ()),
    ("answer is", "The answer is:\n\n$$x = 3.5$$", "x = 3.5", ()),
    ("answer is", r"The answer is \(x^2\) then.", "x^2", ()),
    ("answer is", r"The answer is \[ 12 \]", "12", ()),
    ("answer is", "The answer is 3.14. Next.", "3.14", ()),
    ("answer is", "The answer is .5, I think.", ".5, I think", ()),
    ("answer is", "The answer is 1,234,567.89.", "1,234,567.89", ()),
    ("answer is", "The answer is $18. He pays $20.", "$18", ()),
    ("answer is", r"The answer is \$18.50.", r"\$18.50", ()),
    ("answer is", "The answer is (B).", "(B)", ()),
    ("answer is", "The answer is yes! Great.", "yes", ()),
    ("answer is", "The answer is 42\nand more", "42", ()),
    ("answer is", "the answer  is 北京。好", "北京", ()),
    ("answer is", "The answer is 1. No, the answer is 2.", "2", ("several_answers",)),
    ("answer is", "The answer isn't known. The answer issues", None, ("no_answer",)),
    ("answer is", "The answer is", None, ("no_answer", "cut_off")),
    ("answer is", "The answer is 5. So the answer is", "5", ("cut_off",)),
    ("answer is", "Answer: 42", "42", ()),
    ("answer is", "so 40 + 2.\n  answer : 42.", "42", ()),
    ("answer is", "**Answer:** 42", "42", ()),
    ("answer is", "**Answer**: 42", "42", ()),
    ("answer is", "**Answer: 42** \nDone.", "42", ()),
    ("answer is", "Answer: 2**3", "2**3", ()),
    ("answer is", "Final Answer: 12\n", "12", ()),
    ("answer is", "My answer: 5\nAnswers: 6", None, ("no_answer",)),
    ("answer is", "so\nFinal answer:", None, ("no_answer", "cut_off")),
    ("answer is", "Answer: The answer is 42. Good.", "42", ()),
    ("answer is", "**Answer:** the answer is **42**", "42", ()),
    ("answer is", "Answer: we add first.\nSo the answer is 42.", "42", ("several_answers",)),
    ("answer is", "The answer is not 5, so\nAnswer: 42", "42", ("several_answers",)),
    ("auto", "The answer is 5. \\boxed{6}", "6", ()),
    ("auto", "A: 3\n#### 4", "4", ()),
    ("auto", "<answer>1</answer>\nA: 3", "3", ()),
    ("auto", "The answer is 3, or\nAnswer: 4", "4", ("several_answers",)),
    ("auto", "<think>\nAnswer: maybe 5?</think>\n<answer>7</answer>", "7", ()),
    ("auto", "Answer: <answer>7</answer>", "7", ()),
    ("auto", "The answer is 1. <answer>2</answer>", "2", ()),
    ("auto", "\\boxed{} so the answer is 5.", "5", ()),
    ("auto", r"The answer is \boxed{42", None, ("no_answer", "cut_off")),
    ("auto", "The answer is 7. So\n<answer>7", "7", ("cut_off",)),
    ("auto", "", None, ("no_answer",)),
    ("auto", "Nothing here.", None, ("no_answer",)),
]


@pytest.mark.parametrize(("finder", "text", "answer", "flags"), CASES)
def test_finders(finder: str, text: str, answer: str | None, flags: tuple[str, ...]) -> None:
    found = find_answer(text, finder)
    assert found.flags == flags
    assert (text[found.match.start : found.match.stop] if found.match else None) == answer
    if found.match:
        assert found.match.finder in FINDERS
        assert finder in ("auto", found.match.finder)


def test_the_order_of_auto() -> None:
    assert list(FINDERS) == ["boxed", "####", "A:", "<answer>", "answer is"]


def test_regular_expressions() -> None:
    found = find_answer("x=1; x=22", re.compile(r"x=(\d+)"))
    assert found.match and (found.match.start, found.match.stop, found.match.finder) == (7, 9, r"x=(\d+)")
    assert found.flags == ("several_answers",)
    whole = find_answer("x=1;", re.compile(r"x=\d+"))
    assert whole.match and (whole.match.start, whole.match.stop) == (0, 3)
    assert find_answer("b", re.compile("(a)?b")).flags == ("no_answer",)  # group 1 took no part
    assert find_answer("abc", re.compile("x*")).flags == ("no_answer",)  # empty matches
    with pytest.raises(TypeError, match="not of bytes"):
        find_answer("abc", re.compile(b"a"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("returned", "span", "flags"),
    [
        ((1, 3), (1, 3), ()),
        ([(1, 3)], (1, 3), ()),
        (((0, 1), (2, 3)), (2, 3), ("several_answers",)),
        ([[0, 1], [2, 3]], (2, 3), ("several_answers",)),
        (None, None, ("no_answer",)),
        ([], None, ("no_answer",)),
        ((torch.tensor(1), torch.tensor(2)), (1, 2), ()),
    ],
)
def test_functions(returned: Any, span: tuple[int, int] | None, flags: tuple[str, ...]) -> None:
    found = find_answer("abcde", lambda text: returned)
    assert found.flags == flags
    assert ((found.match.start, found.match.stop) if found.match else None) == span


@pytest.mark.parametrize(
    "returned",
    [(3, 3), (3, 2), (-1, 2), (0, 6), "ab", 3, (0.0, 1.0), (True, 2), [3, 5], [(1, 2), 3], {1: 2}, (1, 2, 3)],
)
def test_bad_functions(returned: Any) -> None:
    def odd(text: str) -> Any:
        return returned

    with pytest.raises(ValueError, match=r"finder 'odd' returned .*0 <= start < stop <= 5"):
        find_answer("abcde", odd)


def test_bad_finders() -> None:
    with pytest.raises(ValueError, match=r"unknown finder 'box'; use one of \['auto', 'boxed', '####'"):
        find_answer("a", "box")
    with pytest.raises(TypeError, match="not int"):
        find_answer("a", 3)  # type: ignore[arg-type]


MARKERS = [
    "\\boxed{",
    "\\boxed{1}",
    "\\boxed ",
    "\\boxed{}",
    "\\",
    "{",
    "}",
    "<answer>",
    "<answer ",
    "#",
    "#### ",
]
SENTENCES = [
    "answer is ",
    "answer is: **",
    "answer ",
    "answer is $",
    "answer is \\(",
    "A:",
    "A:\n",
    "\nanswer \t",
    "\nfinal \t",
]
SIGNS = ["** ", "**", "$$", " ", "\n", "! ", ".", ":"]


@pytest.mark.parametrize("piece", [*MARKERS, *SENTENCES, *SIGNS])
@pytest.mark.parametrize("around", [("", ""), ("answer is ", "}"), ("\\boxed", "</answer>")])
def test_adversarial_text_takes_linear_time(piece: str, around: tuple[str, str]) -> None:
    text = around[0] + piece * (200_000 // len(piece)) + around[1]
    start = time.process_time()
    for finder in ("auto", *FINDERS):
        find_answer(text, finder)
    assert time.process_time() - start < 5  # one pass: well under a second; quadratic: minutes


def test_many_copies_of_a_marker_and_nested_boxes() -> None:
    start = time.process_time()
    assert find_answer("\\boxed{" * 200_000).flags == ("no_answer", "cut_off")
    assert find_answer("answer is " * 200_000).flags == ("no_answer", "cut_off")
    found = find_answer("\\boxed{" * 100_000 + "7" + "}" * 100_000)
    assert found.match and (found.match.start, found.match.stop) == (700_000, 700_001)
    assert time.process_time() - start < 10


@QUICK
@given(st.text(alphabet="\\{}boxedfinalA:#<>/answer is.$*\n 1", max_size=60), st.sampled_from(["auto", *FINDERS]))
def test_an_answer_is_trimmed_and_inside(text: str, finder: str) -> None:
    found = find_answer(text, finder)
    assert ("no_answer" in found.flags) == (found.match is None)
    if found.match:
        answer = text[found.match.start : found.match.stop]
        assert 0 <= found.match.start < found.match.stop <= len(text)
        assert answer == answer.strip() and not answer.endswith(".")


@QUICK
@given(st.text(alphabet="ab{}1 \\.", max_size=12), st.text(max_size=20), st.text(max_size=20))
def test_a_box_comes_back(inner: str, before: str, after: str) -> None:
    inner = re.sub(r"[{}\\]", "", inner)
    before, after = before.replace("\\", ""), re.sub(r"[\\{}]", "", after)
    found = find_answer(f"{before}\\boxed{{{{{inner}}}x}}{after}", "boxed")
    assert found.match
    start = len(before) + len("\\boxed{")
    assert (found.match.start, found.match.stop) == (start, start + len(inner) + 3)


# ------------------------------------------------------------------------- characters and tokens

WORDS = ["12", "the", "the answer", "don't", " .", "x", "\\boxed{", "}", "<|im_end|>", "</s>", "\ufffd"]
SCRIPTS = ["😀", "👩‍👩‍👧", "e\u0301", "é", "你好", "שלום", "مرحبا"]
BLANKS = ["\n", "\n\n", " ", "     ", "\t"]
PIECES = st.sampled_from([*WORDS, *SCRIPTS, *BLANKS])
TEXTS = st.lists(PIECES | st.text(max_size=4), max_size=12).map("".join)


def check_laws(text: str, offsets: list[tuple[int, int]], n: int) -> None:
    assert len(offsets) == n
    position = 0
    for k, (start, stop) in enumerate(offsets):
        assert 0 <= start <= stop <= len(text)
        assert start <= position  # no gap
        if k:
            assert start >= offsets[k - 1][0] and stop >= offsets[k - 1][1]
        position = max(position, stop)
    if n:
        assert offsets[0][0] == 0 and offsets[-1][1] == len(text)


def check_tokens_of(offsets: list[tuple[int, int]], start: int, stop: int) -> None:
    first, last = tokens_of(offsets, start, stop)
    assert first < last
    assert offsets[first][0] <= start and offsets[last - 1][1] >= stop  # holds the characters
    overlap = [k for k, (a, b) in enumerate(offsets) if a < stop and b > start]
    assert (overlap[0], overlap[-1] + 1) == (first, last)  # and no token more


@QUICK
@given(text=TEXTS, data=st.data())
def test_offsets_of_a_tokenised_text(tokenizer: Any, text: str, data: st.DataObject) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    shown, offsets = token_offsets(tokenizer, ids)
    assert shown == (decoded(tokenizer, ids) if ids else "")
    check_laws(shown, offsets, len(ids))
    if "\ufffd" not in shown:  # else a token may get its neighbours' characters as well
        for i, (start, stop) in zip(ids, offsets, strict=True):
            assert stop - start <= len(decoded(tokenizer, [i])) + 1  # its own text and a decoder's blank
    if shown:
        start = data.draw(st.integers(0, len(shown) - 1))
        stop = data.draw(st.integers(start + 1, len(shown)))
        check_tokens_of(offsets, start, stop)
        first, last = tokens_of(offsets, start, stop)
        if "\ufffd" not in shown:
            assert shown[start:stop].strip() in decoded(tokenizer, ids[first:last])


@QUICK
@given(data=st.data())
def test_offsets_of_random_ids(tokenizer: Any, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=30))
    shown, offsets = token_offsets(tokenizer, ids)
    assert shown == (decoded(tokenizer, ids) if ids else "")
    check_laws(shown, offsets, len(ids))
    if shown:
        start = data.draw(st.integers(0, len(shown) - 1))
        check_tokens_of(offsets, start, data.draw(st.integers(start + 1, len(shown))))


@QUICK
@given(text=TEXTS, cuts=st.sets(st.integers(0, 60)))
def test_offsets_of_another_tokenisation(small: Any, text: str, cuts: set[int]) -> None:
    """Bytes grouped at random into known tokens: the truth is the characters that a token's bytes touch."""
    text = text.replace("<|im_end|>", "")
    alphabet = small.backend_tokenizer.get_vocab()
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    shown = "".join(piece for piece, _ in letters.pre_tokenize_str(text))
    ids, sizes, k = [], [], 0
    while k < len(shown):
        size = next(s for s in (4, 3, 2, 1) if s == 1 or (shown[k : k + s] in alphabet and k not in cuts))
        ids.append(alphabet[shown[k : k + size]])
        sizes.append(min(size, len(shown) - k))
        k += size
    owner = [c for c, character in enumerate(text) for _ in character.encode()]
    truth, k = [], 0
    for size in sizes:
        truth.append((owner[k], owner[k + size - 1] + 1))
        k += size
    assert token_offsets(small, ids) == (text, truth)


@QUICK
@given(text=TEXTS)
def test_offsets_agree_with_the_tokenizers_own(text: str) -> None:
    tokenizer = _smollm2()
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    if decoded(tokenizer, encoding["input_ids"]) == text and "\ufffd" not in text:
        assert token_offsets(tokenizer, encoding["input_ids"]) == (text, encoding["offset_mapping"])


_CACHE: dict[str, Any] = {}


def _smollm2() -> Any:
    if "smollm2" not in _CACHE:
        _CACHE["smollm2"] = load("smollm2")
    return _CACHE["smollm2"]


def test_every_token_of_a_character_gets_it(tokenizer: Any) -> None:
    if tokenizer.unk_token == "[UNK]":
        pytest.skip("WordPiece has no byte tokens")
    ids = tokenizer("a😀", add_special_tokens=False)["input_ids"]
    text, offsets = token_offsets(tokenizer, ids)
    smile = text.index("😀")
    parts = [span for span in offsets if span[1] == smile + 1]
    assert len(parts) > 1 and all(span == (smile, smile + 1) for span in parts)


class Counting:
    """A tokenizer that counts how many tokens it decodes."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.work = tokenizer, 0

    def decode(self, ids: list[int], **options: Any) -> str:
        self.work += len(ids)
        return self.tokenizer.decode(ids, **options)


def hostile(tokenizer: Any, kind: str) -> list[int]:
    vocab = tokenizer.get_vocab()
    byte = (lambda x: vocab[f"<0x{x:02X}>"]) if "<0x00>" in vocab else (lambda x: vocab[_letter(x)])
    smile = [byte(x) for x in "😀".encode()]
    return {
        "words": [vocab["t"], vocab["h"], vocab["e"]] * 1000,
        "emoji": smile * 750,
        "lone bytes": [byte(0x80)] * 3000,
        "lead bytes": [byte(0xF0)] * 3000,
        "broken at the end": [*([byte(0x0A)] * 3000), byte(0xFF)],
        "cut emoji": smile[:3] * 1000,
    }[kind]


def _letter(byte: int) -> str:
    """How byte-level vocabularies write a byte: those without a sign of their own count up from 256."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return chr(byte) if byte in plain else chr(256 + sum(1 for x in range(byte) if x not in plain))


@pytest.mark.parametrize("kind", ["words", "emoji", "lone bytes", "lead bytes", "broken at the end", "cut emoji"])
@pytest.mark.parametrize("build", [byte_level, metaspace])
def test_offsets_take_linear_work(build: Any, kind: str) -> None:
    tokenizer = build()
    ids = hostile(tokenizer, kind)
    counting = Counting(tokenizer)
    text, offsets = token_offsets(counting, ids)
    check_laws(text, offsets, len(ids))
    assert counting.work <= 40 * len(ids)


@pytest.mark.parametrize("broken", ["\ufffd😀", "\ufffd\ufffd😀", "😀\ufffd\ufffd😀"])
def test_offsets_recover_after_a_replacement_character(broken: str) -> None:
    """One in the text itself looks like broken bytes; what follows still gets its own characters."""
    tokenizer = metaspace()
    ids = tokenizer(broken + " the 12" * 10, add_special_tokens=False)["input_ids"]
    text, offsets = token_offsets(tokenizer, ids)
    assert [text[start:stop] for start, stop in offsets[-15:]] == [" the", " ", "12"] * 5
    check_laws(text, offsets, len(ids))


def test_no_tokens() -> None:
    assert token_offsets(None, []) == ("", [])


def test_tokens_of() -> None:
    offsets = [(0, 0), (0, 2), (2, 2), (2, 5), (4, 5), (5, 6), (6, 6)]
    assert tokens_of(offsets, 0, 1) == (1, 2)
    assert tokens_of(offsets, 1, 3) == (1, 4)
    assert tokens_of(offsets, 4, 5) == (3, 5)
    assert tokens_of(offsets, 2, 6) == (3, 6)
    assert tokens_of(offsets, 6, 9) == (7, 7)  # past the end: none
    for start, stop in ((2, 2), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="0 <= start < stop"):
            tokens_of(offsets, start, stop)


def bools(*marked: int, n: int = 8) -> torch.Tensor:
    mask = torch.zeros(n, dtype=torch.bool)
    mask[list(marked)] = True
    return mask


def test_sinks() -> None:
    answer = bools(3, 4, 7)
    assert sinks_of(answer, "paper").equal(answer)
    assert sinks_of(answer, "paper") is not answer
    assert sinks_of(answer, "flowgraph").equal(bools(2, 3, 6))
    assert sinks_of(answer).equal(bools(2, 3, 6))
    assert not sinks_of(bools()).any()
    with pytest.raises(ValueError, match=r"token 0.*use preset='paper'"):
        sinks_of(bools(0, 1))
    assert sinks_of(bools(0), "paper").equal(bools(0))
    with pytest.raises(ValueError, match=r"unknown preset 'x'; use one of \['flowgraph', 'paper'\]"):
        sinks_of(answer, "x")


@QUICK
@given(start=st.integers(1, 7), length=st.integers(1, 7), preset=st.sampled_from(PRESETS))
def test_sink_shift(start: int, length: int, preset: str) -> None:
    answer = bools(*range(start, min(start + length, 8)))
    shift = 1 if preset == "flowgraph" else 0
    expected = [k - shift for k in answer.nonzero().flatten().tolist()]
    assert sinks_of(answer, preset).nonzero().flatten().tolist() == expected


# ------------------------------------------------------------------------- encoding


def test_encode_text(tokenizer: Any) -> None:
    encoded = encode_text(tokenizer, "3 + 4 =", " 7. The answer is 7.")
    prompt = tokenizer("3 + 4 =")["input_ids"]
    response = tokenizer(" 7. The answer is 7.", add_special_tokens=False)["input_ids"]
    assert encoded.token_ids.tolist() == prompt + response
    assert encoded.token_ids.dtype == torch.long
    assert encoded.prompt_mask.tolist() == [True] * len(prompt) + [False] * len(response)
    assert encoded.response_mask.equal(~encoded.prompt_mask)


def test_encode_text_needs_both(small: Any) -> None:
    with pytest.raises(ValueError, match="prompt has no tokens: ''"):
        encode_text(small, "", "a")
    with pytest.raises(ValueError, match="response has no tokens: ''"):
        encode_text(small, "a", "")


TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "hi, you are user im assistant"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "call the tool"},
    {"role": "user", "content": "tool says 4"},
    {"role": "assistant", "content": "So \\boxed{4}."},
]


def shown(tokenizer: Any, encoded: Encoded, part: Tensor | slice) -> str:
    """The text of a part of the tokens."""
    return decoded(tokenizer, encoded.token_ids[part].tolist())


def test_encode_messages(chat: Any) -> None:
    encoded = encode_messages(chat, TALK)
    assert decoded(chat, encoded.token_ids.tolist()) == chat.apply_chat_template(TALK, tokenize=False)
    prompt = chat.apply_chat_template(TALK[:2], tokenize=False, add_generation_prompt=True)
    assert shown(chat, encoded, encoded.prompt_mask) == prompt
    response = shown(chat, encoded, encoded.response_mask)
    assert response == "call the tool<|im_end|>So \\boxed{4}.<|im_end|>"
    assert not (encoded.prompt_mask & encoded.response_mask).any()
    neither = encoded.token_ids[~encoded.prompt_mask & ~encoded.response_mask].tolist()
    assert decoded(chat, neither) == "\n<|im_start|>user\ntool says 4<|im_end|>\n<|im_start|>assistant\n\n"


def test_the_messages_equal_generation(chat: Any) -> None:
    """The ids are those of the rendered prompt followed by those of the answer alone."""
    encoded = encode_messages(chat, [*TALK[:2], TALK[-1]])
    prompt = chat.apply_chat_template(TALK[:2], add_generation_prompt=True, tokenize=False)
    ids = chat(prompt, add_special_tokens=False)["input_ids"] + chat(TALK[-1]["content"])["input_ids"]
    assert encoded.token_ids.tolist()[: len(ids)] == ids


@pytest.mark.parametrize("content", ["hi", "im", "user", "\n", "<|im_end|>", "What is 2+3? 你好 😀"])
def test_question_of_messages(chat: Any, content: str) -> None:
    talk = [TALK[0], {"role": "user", "content": content}, {"role": "user", "content": "And you?"}, *TALK[2:]]
    encoded = encode_messages(chat, talk)
    question = question_of_messages(chat, talk, encoded)
    assert not (question & ~encoded.prompt_mask).any()
    text = shown(chat, encoded, question)
    if content.strip():
        assert text == content + "And you?"
        first = shown(chat, encoded, slice(int(question.nonzero()[0])))
        assert first.endswith("<|im_start|>user\n")
    else:
        assert text == "And you?"


HISTORY: list[dict[str, Any]] = [
    {"role": "user", "content": "2 times 3?"},
    {"role": "assistant", "content": "\\boxed{6}"},
    {"role": "user", "content": "A crate holds 12."},
    {"role": "user", "content": "And 4 crates?"},
    {"role": "assistant", "content": "I cannot tell."},
]


def test_answers_before_the_response_are_part_of_the_prompt(chat: Any) -> None:
    encoded = encode_messages(chat, HISTORY, first=4)
    assert shown(chat, encoded, encoded.response_mask) == "I cannot tell.<|im_end|>"
    prompt = chat.apply_chat_template(HISTORY[:4], tokenize=False, add_generation_prompt=True)
    assert shown(chat, encoded, encoded.prompt_mask) == prompt
    question = question_of_messages(chat, HISTORY, encoded, first=4)
    assert shown(chat, encoded, question) == "A crate holds 12.And 4 crates?"
    with pytest.raises(ValueError, match=r"first must be the number of an assistant message, .* got 3"):
        encode_messages(chat, HISTORY, first=3)
    with pytest.raises(ValueError, match=r"first must be the number of an assistant message, .* got 5"):
        encode_messages(chat, HISTORY, first=5)


def test_a_tool_between_question_and_response(chat: Any) -> None:
    talk = [*HISTORY[:3], {"role": "assistant", "content": "call"}, {"role": "tool", "content": "48"}, HISTORY[-1]]
    encoded = encode_messages(chat, talk, first=5)
    question = question_of_messages(chat, talk, encoded, first=5)
    assert shown(chat, encoded, question) == "A crate holds 12."


def test_content_in_parts_is_their_text(chat: Any) -> None:
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "2+3?"}]
    said = [{"type": "text", "text": "\\boxed{5}"}]
    talk: list[dict[str, Any]] = [{"role": "user", "content": parts}, {"role": "assistant", "content": said}]
    plain = [{"role": "user", "content": "What is 2+3?"}, {"role": "assistant", "content": "\\boxed{5}"}]
    encoded, expected = encode_messages(chat, talk), encode_messages(chat, plain)
    assert encoded.token_ids.equal(expected.token_ids)
    assert question_of_messages(chat, talk, encoded).equal(question_of_messages(chat, plain, expected))
    parts.append({"type": "image", "url": "a.png"})
    with pytest.raises(ValueError, match=r"messages\[0\]: content holds parts that are no text"):
        encode_messages(chat, talk)


def test_options_of_the_template() -> None:
    thinking = byte_level()
    thinking.chat_template = "{{ 'no thoughts\n' if enable_thinking is false }}" + CHATML
    more = {"enable_thinking": False}
    encoded = encode_messages(thinking, TALK[:3], template_options=more)
    assert decoded(thinking, encoded.token_ids).startswith("no thoughts\n<|im_start|>system")
    question = question_of_messages(thinking, TALK[:3], encoded, template_options=more)
    assert decoded(thinking, encoded.token_ids[question].tolist()) == "hi"


def test_question_errors(chat: Any, small: Any) -> None:
    encoded = encode_messages(chat, TALK)
    with pytest.raises(ValueError, match="make it with encode_messages"):
        question_of_messages(chat, [{"role": "user", "content": "other"}, *TALK[2:]], encoded)
    system = [TALK[0], *TALK[2:]]
    with pytest.raises(ValueError, match="no user message with text"):
        question_of_messages(chat, system, encode_messages(chat, system))
    with pytest.raises(ValueError, match="not a fast one"):
        question_of_messages(object(), TALK, encoded)
    loud = byte_level()
    loud.chat_template = CHATML.replace("m['content']", "m['content'] | upper")
    with pytest.raises(ValueError, match=r"rewrites the content of messages\[1\]"):
        question_of_messages(loud, TALK, encode_messages(loud, TALK))
    empty: list[dict[str, Any]] = [{"role": "user", "content": None}, TALK[-1]]
    loud.chat_template = CHATML.replace("m['content']", "m['content'] | string")
    with pytest.raises(ValueError, match=r"messages\[0\]: content must be text, not NoneType"):
        question_of_messages(loud, empty, encode_messages(loud, empty))
    trimmed = byte_level()
    trimmed.chat_template = CHATML.replace("m['content']", "m['content'] | trim")
    talk = [{"role": "user", "content": "  hi there \n"}, TALK[-1]]
    encoded = encode_messages(trimmed, talk)
    mask = question_of_messages(trimmed, talk, encoded)
    assert decoded(trimmed, encoded.token_ids[mask].tolist()) == "hi there"


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "must be an assistant one, got role None"),
        (TALK[:2], "must be an assistant one, got role 'user'"),
        ([TALK[1], {"role": "assistant", "content": " "}], "needs text as content, got ' '"),
        ([TALK[1], {"role": "assistant", "content": None}], "needs text as content, got None"),
        ([TALK[2]], "there is no prompt"),
    ],
)
def test_bad_messages(small: Any, messages: list[dict[str, Any]], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        encode_messages(small, messages)


def test_a_template_that_rewrites_the_past(small: Any) -> None:
    forgetful = byte_level()
    forgetful.chat_template = CHATML.replace("m['content']", "(m['content'] if loop.last else '')")
    with pytest.raises(ValueError, match="give prompt and response as text, or token ids and masks"):
        encode_messages(forgetful, TALK)


# ------------------------------------------------------------------------- locate


def test_the_answers_tokens_hold_the_answer(tokenizer: Any) -> None:
    for response in (
        "So it is \\boxed{12}.",
        "3 + 4 = 7\n#### 12",
        "The answer is 12.",
        "<answer>12</answer> 12",
    ):
        if "\\" in response and tokenizer.unk_token == "[UNK]":
            continue
        encoded = encode_text(tokenizer, "3 + 9 = ?", response)
        spans = locate(encoded.token_ids, encoded.prompt_mask, tokenizer=tokenizer, answer="auto")
        if tokenizer.unk_token == "[UNK]" and spans.answer_text is None:
            continue  # WordPiece decodes "####" as "# # # #"
        where = spans.answer_tokens.nonzero().flatten()
        assert spans.answer_text == "12"
        assert "12" in decoded(tokenizer, encoded.token_ids[where].tolist())
        assert len(where) <= 2
        assert spans.answer_mask.nonzero().flatten().tolist() == (where - 1).tolist()
        assert spans.question_mask.equal(encoded.prompt_mask)
        assert spans.flags == ()
        paper = locate(encoded.token_ids, encoded.prompt_mask, tokenizer=tokenizer, preset="paper")
        assert paper.answer_mask.equal(spans.answer_tokens)


def test_the_wordpiece_answer() -> None:
    tokenizer = wordpiece()
    encoded = encode_text(tokenizer, "3 + 4", "The answer is 12.")
    assert locate(encoded.token_ids, encoded.prompt_mask, tokenizer=tokenizer).answer_text == "12"


@QUICK
@given(before=TEXTS, answer=st.text(min_size=1, max_size=6), after=TEXTS)
def test_locate_finds_what_was_boxed(small: Any, before: str, answer: str, after: str) -> None:
    answer = re.sub(r"[\\{}]", "x", answer).strip(" .") + "x"
    clean = [re.sub(r"\\|[{}]|<\|im_end\|>", "", part) for part in (before, after)]
    encoded = encode_text(small, "Q", f"{clean[0]}\\boxed{{{answer}}}{clean[1]}")
    spans = locate(encoded.token_ids, encoded.prompt_mask, tokenizer=small)
    assert spans.answer_text == answer.strip()
    assert answer.strip() in decoded(small, encoded.token_ids[spans.answer_tokens].tolist())


def test_messages_all_the_way(chat: Any) -> None:
    encoded = encode_messages(chat, TALK)
    question = question_of_messages(chat, TALK, encoded)
    spans = locate(
        encoded.token_ids, encoded.prompt_mask, encoded.response_mask, tokenizer=chat, question_mask=question
    )
    assert (spans.answer_text, spans.finder, spans.flags) == ("4", "boxed", ())
    assert spans.question_mask.equal(question)
    ends = torch.isin(encoded.token_ids, torch.tensor(chat.all_special_ids))
    assert spans.credit_mask.equal(encoded.response_mask & ~spans.answer_tokens & ~ends)


@pytest.mark.parametrize("marker", ["#### 4", "A: 4", "The answer is 4"])
def test_the_end_of_a_turn_is_no_part_of_the_answer(chat: Any, marker: str) -> None:
    talk = [TALK[1], {"role": "assistant", "content": marker}]
    encoded = encode_messages(chat, talk)
    spans = locate(encoded.token_ids, encoded.prompt_mask, encoded.response_mask, tokenizer=chat)
    assert spans.answer_text == "4"
    whole = locate(encoded.token_ids, encoded.prompt_mask, tokenizer=chat)  # with the blank after the turn
    assert whole.answer_text == "4"
    own = locate(encoded.token_ids, encoded.prompt_mask, tokenizer=chat, answer=re.compile("(?:####|A:|is) (.*)"))
    assert own.answer_text == "4"
    end = locate(encoded.token_ids, encoded.prompt_mask, tokenizer=chat, answer=re.compile(r"<\|im_end\|>"))
    assert end.answer_text == "<|im_end|>" and int(end.answer_tokens.sum()) == 1


def test_answer_tags_that_are_special_tokens() -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<answer>", "</answer>"]})
    encoded = encode_text(tokenizer, "Q", "so <answer>12</answer><|im_end|>")
    spans = locate(encoded.token_ids, encoded.prompt_mask, tokenizer=tokenizer)
    assert (spans.answer_text, spans.finder) == ("12", "<answer>")
    assert decoded(tokenizer, encoded.token_ids[spans.answer_tokens].tolist()) == "12"


def test_holes_are_not_searched_and_break_lines(small: Any) -> None:
    parts = [("Q?", "p"), ("#### 12", "r"), (" tool \\boxed{9}", "t"), ("34 so", "r"), ("\n#### 56", "r")]
    ids: list[int] = []
    roles: list[str] = []
    for text, role in parts:
        piece = small(text)["input_ids"]
        ids += piece
        roles += role * len(piece)
    token_ids = torch.tensor(ids)
    prompt, response, tool = (torch.tensor([r == role for r in roles]) for role in "prt")
    spans = locate(token_ids, prompt, response, tokenizer=small)
    assert spans.answer_text == "56" and spans.flags == ("several_answers",)
    assert not (spans.credit_mask & tool).any()
    masked = locate(token_ids, prompt, tokenizer=small, tool_mask=tool)
    assert masked.answer_tokens.equal(spans.answer_tokens) and masked.credit_mask.equal(spans.credit_mask)
    first = locate(token_ids, prompt, response, tokenizer=small, answer=lambda t: (t.index("12"), t.index("12") + 2))
    assert first.answer_text == "12"
    assert decoded(small, token_ids[first.answer_tokens].tolist()).strip() == "12"
    line = locate(token_ids, prompt, response, tokenizer=small, answer=re.compile("####(.*?)so", re.DOTALL))
    assert line.answer_text == " 12\n34 "  # over the hole, without it
    assert not (line.answer_tokens & tool).any()
    with pytest.raises(ValueError, match="which no token holds"):
        locate(token_ids, prompt, response, tokenizer=small, answer=lambda t: (t.index("\n"), t.index("\n") + 1))


IDS = torch.arange(8)
PROMPT = bools(0, 1, 2)


def test_masks_given() -> None:
    spans = locate(IDS, PROMPT, answer_tokens=bools(5, 6))
    assert spans.answer_tokens.equal(bools(5, 6)) and spans.answer_mask.equal(bools(4, 5))
    assert spans.credit_mask.equal(bools(3, 4, 7)) and spans.response_mask.equal(~PROMPT)
    assert (spans.flags, spans.answer_text, spans.finder) == ((), None, None)
    assert locate(IDS, PROMPT, answer_tokens=bools(5, 6), preset="paper").answer_mask.equal(bools(5, 6))
    assert locate(IDS, PROMPT, answer_tokens=bools(3)).answer_mask.equal(bools(2))  # the last prompt token
    sinks = locate(IDS, PROMPT, sink_mask=bools(1, 6), answer_tokens=bools(5))
    assert sinks.answer_mask.equal(bools(1, 6)) and not sinks.answer_tokens.any()
    assert sinks.credit_mask.equal(~PROMPT)
    special = locate(IDS, PROMPT, answer_tokens=bools(5), special_ids=[7, 7], tool_mask=bools(4))
    assert special.credit_mask.equal(bools(3, 6))
    assert locate(IDS, PROMPT, question_mask=bools(1), answer_tokens=bools(5)).question_mask.equal(bools(1))
    hole = locate(IDS, PROMPT, bools(3, 4, 7), answer_tokens=bools(7))
    assert hole.answer_mask.equal(bools(6)) and hole.credit_mask.equal(bools(3, 4))


def test_no_answer() -> None:
    for given_masks in ({"answer_tokens": bools()}, {"sink_mask": bools()}):
        spans = locate(IDS, PROMPT, **given_masks)  # type: ignore[arg-type]
        assert spans.flags == ("no_answer",) and not spans.answer_mask.any()
        assert spans.credit_mask.equal(~PROMPT)
        tail = locate(
            IDS,
            PROMPT,
            no_answer="tail",
            tail_tokens=2,
            special_ids=[7],
            tool_mask=bools(5),
            **given_masks,  # type: ignore[arg-type]
        )
        assert tail.flags == ("no_answer", "tail_answer")
        assert tail.answer_tokens.equal(bools(4, 6)) and tail.answer_mask.equal(bools(3, 5))
        assert tail.credit_mask.equal(bools(3))
    bare = locate(IDS, PROMPT, answer_tokens=bools(), no_answer="tail", special_ids=range(8))
    assert bare.flags == ("no_answer",) and not bare.answer_mask.any()


def test_flags_of_the_finder(small: Any) -> None:
    def flags(response: str, **options: Any) -> tuple[str, ...]:
        encoded = encode_text(small, "Q", response)
        return locate(encoded.token_ids, encoded.prompt_mask, tokenizer=small, **options).flags

    assert flags("\\boxed{1}") == ()
    assert flags("\\boxed{1", no_answer="tail") == ("no_answer", "tail_answer", "cut_off")
    assert flags("\\boxed{1} \\boxed{2} so", truncated=True) == ("cut_off", "several_answers")
    assert flags("nothing", truncated=True) == ("no_answer", "cut_off")
    assert flags("nothing<|im_end|>") == ("no_answer",)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"preset": "x"}, r"unknown preset 'x'; use one of \['flowgraph', 'paper'\]"),
        ({"no_answer": "x"}, r"unknown no_answer 'x'; use one of \['uniform', 'tail'\]"),
        ({"tail_tokens": 0}, "tail_tokens must be at least 1, got 0"),
        ({"token_ids": torch.zeros(8)}, r"token_ids must be .* got torch.float32 \[8\]"),
        ({"token_ids": IDS[None]}, r"token_ids must be .* got torch.int64 \[1, 8\]"),
        ({"token_ids": [1, 2]}, "token_ids must be .* got list"),
        (
            {"token_ids": IDS[:1], "prompt_mask": bools(n=1)},
            "at least 2 tokens, a prompt and a response, got 1",
        ),
        ({"prompt_mask": bools(0, n=7)}, r"prompt_mask must be a bool tensor \[8\].*got torch.bool \[7\]"),
        ({"prompt_mask": PROMPT.long()}, r"prompt_mask must be .* got torch.int64 \[8\]"),
        ({"response_mask": [True] * 8}, "response_mask must be .* got list"),
        ({"tool_mask": bools(n=9)}, "tool_mask must be"),
        ({"sink_mask": bools(n=9)}, "sink_mask must be"),
        ({"answer_tokens": bools(n=9)}, "answer_tokens must be"),
        ({"question_mask": bools(n=9)}, "question_mask must be"),
        ({"prompt_mask": bools()}, "prompt_mask marks no token: the prompt is empty"),
        ({"prompt_mask": ~bools()}, "response_mask marks no token: the response is empty"),
        ({"response_mask": bools()}, "the response is empty"),
        ({"question_mask": bools()}, "the question is empty"),
        ({"question_mask": bools(1, 4)}, r"question_mask marks 1 tokens \(the first: 4\) outside the prompt"),
        ({"response_mask": bools(2, 3)}, r"response_mask marks 1 tokens \(the first: 2\) in prompt_mask too"),
        ({"answer_tokens": bools(2, 3)}, "the answer starts in the prompt"),
        (
            {"answer_tokens": bools(5, 6), "response_mask": bools(3, 5)},
            r"\(the first: 6\) outside the response",
        ),
        ({"answer_tokens": None}, "needs tokenizer; give it, or answer_tokens, or sink_mask"),
    ],
)
def test_bad_input(change: dict[str, Any], problem: str) -> None:
    options: dict[str, Any] = {"token_ids": IDS, "prompt_mask": PROMPT, "answer_tokens": bools(5)} | change
    with pytest.raises(ValueError, match=problem):
        locate(**options)


def test_an_unknown_finder(small: Any) -> None:
    encoded = encode_text(small, "Q", "A: 1")
    with pytest.raises(ValueError, match="unknown finder 'gsm8k'"):
        locate(encoded.token_ids, encoded.prompt_mask, tokenizer=small, answer="gsm8k")


def test_the_callers_masks_stay_as_they_are(small: Any) -> None:
    answer = bools()
    locate(IDS, PROMPT, answer_tokens=answer, no_answer="tail")
    assert not answer.any()


def test_a_template_that_shows_nothing_of_a_text_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = "{% for m in messages %}<{{ m.role }}>{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}"
    parts += "{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    monkeypatch.setattr(TOKENIZER, "chat_template", parts, raising=False)
    talk = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
    with pytest.raises(ValueError, match=r"the chat template shows nothing of the text of messages\[1\]"):
        encode_messages(TOKENIZER, talk)
