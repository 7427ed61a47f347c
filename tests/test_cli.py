"""The program: every command, every exit code, what goes to stdout and what to stderr, and hostile input."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from flowgraph import Mass, Threshold, TopK, Tracer, __version__, answers, cli, cli_options, segments, spans, terminal
from flowgraph import smollm2 as smollm2_source
from flowgraph.credit import _RULES, SCORES
from flowgraph.exact import exact_flow
from flowgraph.flow import Flow
from flowgraph.measures import MEASURES, measures
from flowgraph.options import Options
from flowgraph.solve import BACKENDS, SOLVERS, Solution, System

ROOT = Path(__file__).resolve().parents[1]
PROMPT, RESPONSE = "What is 6 times 7?", "6 times 7 is 42.\nThe answer is 42."
TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('no such role: ' + m.role) }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a byte-level tokenizer and a chat template, as save_pretrained leaves them."""
    path = tmp_path_factory.mktemp("tiny [model]")  # brackets are markup to rich
    special = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([PROMPT, RESPONSE] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", chat_template=TEMPLATE)
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture
def tokenizer(folder: Path) -> Any:
    return PreTrainedTokenizerFast.from_pretrained(folder)


def invoke(*arguments: str | Path, env: dict[str, str] | None = None) -> Result:
    settings = {"NO_COLOR": "1", "COLUMNS": "200", "FLOWGRAPH_TRACEBACK": "", "FORCE_COLOR": None} | (env or {})
    return CliRunner().invoke(cli.app, [str(a) for a in arguments], env=settings)


def good(*arguments: str | Path, env: dict[str, str] | None = None) -> Result:
    result = invoke(*arguments, env=env)
    assert result.exit_code == 0, result.output
    return result


def refused(code: int, *arguments: str | Path) -> str:
    """stderr of a command that must end with `code`, without a traceback and with nothing on stdout."""
    result = invoke(*arguments)
    assert result.exit_code == code, (result.exit_code, result.output, result.exception)
    assert "Traceback" not in result.output
    assert result.stdout == ""
    if code == 1:
        assert result.stderr.splitlines()[-1].startswith("error: ")
    return result.stderr


def program(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1", "COLUMNS": "200"} | options.pop("env", {})
    command = [sys.executable, "-m", "flowgraph.cli", *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, **options)


def trace(folder: Path, *more: str | Path) -> list[str | Path]:
    return ["trace", "-m", folder, "-p", PROMPT, "-r", RESPONSE, *more]


# ------------------------------------------------------------------------- help and choices


def test_help_teaches() -> None:
    for command in ("trace", "report", "score", "compare", "stability", "doctor", "demo"):
        assert command in good("--help").stdout
        text = good(command, "--help").stdout
        assert "flowgraph " + command in text or command in ("doctor", "demo")
        assert "[bold]" not in text and "[/]" not in text, "markup is shown as text"
    text = good("score", "--help").stdout
    columns = ("line", "id", "response_token_ids", "weights", "throughput", "reach", "answer", "flags", *MEASURES)
    assert [column for column in columns if column not in text] == []
    assert '"messages": [..., {' in text, "brackets are not taken for markup"


def test_version() -> None:
    assert good("--version").stdout.strip() == f"flowgraph {__version__}"


def test_choices_are_those_of_the_library_and_help_names_them() -> None:
    assert ("auto", *SOLVERS) == cli_options.SOLVERS
    assert ("auto", *BACKENDS) == cli_options.BACKENDS
    assert ("auto", *answers.FINDERS) == cli_options.FINDERS
    assert tuple(_RULES) == cli_options.RULES
    assert set(segments._SPLITTERS) == set(cli_options.DIVISIONS)
    assert set(terminal.FLAGS) == {*answers.FLAGS, "no_flow"}
    choices = (
        *cli_options.SOLVERS,
        *cli_options.BACKENDS,
        *cli_options.FINDERS,
        *cli_options.RULES,
        *SCORES,
        *spans.PRESETS,
    )
    for command in ("trace", "report", "score", "stability"):
        text = good(command, "--help").stdout
        for choice in (*choices, *spans.NO_ANSWER, "edges", "exact", "prompt", "user", "float32", "bfloat16"):
            assert choice in text


# ------------------------------------------------------------------------- trace


def test_trace_as_json_is_what_the_tracer_says(folder: Path, tokenizer: Any) -> None:
    result = good(*trace(folder, "--json", "-", "--rule", "rank", "--gain", "2"))
    shown = json.loads(result.stdout)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = Tracer(model, tokenizer, rule="rank", gain=2.0)([{"role": "user", "content": PROMPT}], RESPONSE)
    assert shown["tokens"] == json.loads(json.dumps(expected.to_dict()))["tokens"]
    assert shown["answer"]["text"] == "42"
    assert shown["options"]["rule"] == "rank"
    assert max(shown["tokens"]["weight"]) == 2


Seen = list[tuple[Options, torch.dtype, Any, Any]]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """(options, dtype of the model, prompt, response) of each trace."""
    calls: Seen = []
    original = Tracer.__call__

    def spy(self: Tracer, prompt: Any, response: Any) -> Any:
        calls.append((self.options, self.model.dtype, prompt, response))  # type: ignore[arg-type]
        return original(self, prompt, response)

    monkeypatch.setattr(Tracer, "__call__", spy)
    return calls


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Options]:
    """The options of each trace, one by one or in a batch."""
    calls: list[Options] = []
    original = Tracer.from_ids

    def spy(self: Tracer, *args: Any, **kwargs: Any) -> Any:
        if self.tokenizer is not None:  # without one: the try-out when a model is loaded
            calls.append(self.options)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Tracer, "from_ids", spy)
    return calls


OPTIONS: list[tuple[list[str], Options]] = [
    ([], Options()),
    (
        [
            *("--layers", "0,2", "--preset", "paper", "--mode", "edges", "--edges", "top:5", "--answer", "answer is"),
            *("--score", "reach", "--rule", "softmax", "--top", "0.2", "--gain", "3", "--no-answer", "tail"),
            *("--tail-tokens", "4", "--max-tokens", "100", "--solver", "scatter", "--absorb-at-prompt"),
            *("--backend", "torch", "--temperature", "0.5", "--question", "user"),
        ],
        Options(
            layers=[0, 2], preset="paper", mode="edges", edges=TopK(5), answer="answer is", score="reach",
            rule="softmax", top=0.2, gain=3.0, no_answer="tail", tail_tokens=4, max_tokens=100, solver="scatter",
            backend="torch", absorb_at_prompt=True, temperature=0.5, question="user",
        ),
    ),
    (["--mode", "exact", "--edges", "mass:0.9"], Options(mode="exact", edges=Mass(0.9))),
    (["--mode", "exact"], Options(mode="exact")),
    (
        ["--mode", "sparse", "--weights", "value_norm", "--chunk", "64", "--offload", "--memory", "8GB"],
        Options(mode="sparse", weights="value_norm", chunk=64, offload=True, memory=8 * 10**9),
    ),
    (["--chunk", "none"], Options(chunk=None)),
    (["--edges", "all"], Options(edges=Threshold(0.0))),
    (["--edges", "1/64"], Options(edges=Threshold(1 / 64))),
    (["--answer-regex", r"is (\d+)"], Options(answer=re.compile(r"is (\d+)"))),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "expected"), OPTIONS)
def test_every_option_reaches_the_tracer(
    folder: Path, tmp_path: Path, told: list[Options], arguments: list[str], expected: Options
) -> None:
    good(*trace(folder, "-q", *arguments))
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": PROMPT, "response": RESPONSE}))
    good("score", tmp_path / "in.jsonl", tmp_path / "out.parquet", "-m", folder, "-q", *arguments)
    assert told == [expected, expected]


def test_some_options_differ_from_the_default_in_every_field() -> None:
    given = [options for _, options in OPTIONS]
    same = [field.name for field in fields(Options) if len({str(getattr(o, field.name)) for o in given}) == 1]
    # These are of use only where a trace stays in memory.
    assert same == ["keep_attention", "witnesses"]


def test_dtype_device_and_chat(folder: Path, seen: Seen) -> None:
    good(*trace(folder, "-q", "--no-chat", "--dtype", "bfloat16", "--device", "cpu"))
    good(*trace(folder, "-q"))
    assert [call[1:] for call in seen] == [
        (torch.bfloat16, PROMPT, RESPONSE),
        (torch.float32, [{"role": "user", "content": PROMPT}], RESPONSE),  # chat, where there is a template
    ]


def test_the_modes_agree_and_say_which_they_are(folder: Path) -> None:
    edges, exact = (
        json.loads(good(*trace(folder, "--mode", mode, "--json", "-")).stdout) for mode in ("edges", "exact")
    )
    assert (edges["solver"], exact["solver"]) == ("scipy", "exact")
    assert exact["tokens"]["throughput"] == pytest.approx(edges["tokens"]["throughput"], rel=1e-4)
    assert "| solver exact |" in good(*trace(folder, "--mode", "exact")).stdout


def test_the_question_of_the_user(folder: Path, tmp_path: Path) -> None:
    sources = json.loads(good(*trace(folder, "--question", "user", "--json", "-")).stdout)["tokens"]
    assert "".join(t for t, is_source in zip(sources["text"], sources["source"], strict=True) if is_source) == PROMPT
    assert "needs chat messages" in refused(1, *trace(folder, "--question", "user", "--no-chat"))
    (tmp_path / "ids.jsonl").write_text(json.dumps({"prompt_ids": [1, 2], "response_ids": [3, 4]}))
    ids: list[str | Path] = ["trace", "-m", folder, "--jsonl", tmp_path / "ids.jsonl", "--question", "user"]
    assert "token ids don't say what the user wrote" in refused(1, *ids)


def test_the_tail_stands_for_an_answer(folder: Path) -> None:
    silent: list[str | Path] = ["trace", "-m", folder, "-p", PROMPT, "-r", "I do not know"]
    text = good(*silent, "--no-answer", "tail", "--tail-tokens", "2").stdout
    assert "tail_answer: the last tokens" in text
    assert "Top tokens" in text


def test_the_forms_of_input_agree(folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text(PROMPT + "\n")
    (tmp_path / "r.txt").write_bytes(b"\xef\xbb\xbf" + RESPONSE.encode())
    messages = [{"role": "user", "content": PROMPT}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    rows = [
        {"prompt": PROMPT, "response": RESPONSE},
        {"messages": [*messages, {"role": "assistant", "content": RESPONSE}]},
        {"prompt_ids": prompt, "response_ids": [*tokenizer(RESPONSE)["input_ids"], tokenizer.eos_token_id]},
    ]
    jsonl = tmp_path / "in.jsonl"
    jsonl.write_text("\n".join(map(json.dumps, rows)))
    forms: list[list[str | Path]] = [
        ["-p", PROMPT, "-r", RESPONSE],
        ["--prompt-file", tmp_path / "p.txt", "--response-file", tmp_path / "r.txt"],
        ["--jsonl", jsonl],
        ["--jsonl", jsonl, "--line", "2"],
        ["--jsonl", jsonl, "--line", "3"],
    ]
    tokens = [json.loads(good("trace", "-m", folder, *form, "--json", "-").stdout)["tokens"] for form in forms]
    assert all(one == tokens[0] for one in tokens)


def test_trace_writes_files_and_quiet_says_nothing(folder: Path, tmp_path: Path) -> None:
    page, data = tmp_path / "new" / "t.html", tmp_path / "other" / "t.json"
    result = good(*trace(folder, "--html", page, "--json", data, "--quiet"))
    assert result.output == ""
    assert page.read_text().startswith("<!")
    assert json.loads(data.read_text())["answer"]["text"] == "42"
    result = good(*trace(folder, "--json", data))
    assert f"wrote {data}" in result.stderr
    assert "wrote" not in result.stdout


def test_without_colours_a_table_stands_for_the_heat_map(folder: Path) -> None:
    result = good(*trace(folder))
    assert "\x1b" not in result.output
    assert "Top tokens by mix" in result.stdout
    assert 'answer "42" (answer is)' in result.stdout
    assert "»" in result.stdout
    assert "low" not in result.stdout


def test_with_colours_there_is_a_heat_map(folder: Path) -> None:
    colours = {"NO_COLOR": "", "FORCE_COLOR": "1", "COLORTERM": "truecolor", "TERM": "xterm-256color"}
    text = good(*trace(folder), env=colours).stdout
    background = set(re.findall(r"\x1b\[[\d;]*48;2;(\d+;\d+;\d+)m", text))
    assert len(background) == len(terminal.SHADES)
    plain = re.sub(r"\x1b\[[\d;]*m", "", text)
    assert PROMPT in plain
    assert "The answer is 42." in plain
    assert "low" in plain and "high" in plain
    few = good(*trace(folder), env=colours | {"COLORTERM": "", "TERM": "xterm-16color"}).stdout
    assert set(re.findall(r"\x1b\[\d+;(4\d)m", few)) == {"41", "42", "43", "44", "46"}


def test_flags_are_said_in_words(folder: Path) -> None:
    result = good("trace", "-m", folder, "-p", PROMPT, "-r", "I do not know")
    assert "no_answer: no answer was found" in result.stdout
    assert "Top tokens" not in result.stdout
    result = good("trace", "-m", folder, "-p", PROMPT, "-r", "The answer is 41. No, the answer is 42.")
    assert "several_answers: " in result.stdout


def test_a_response_cannot_command_the_terminal(folder: Path) -> None:
    evil = "\x1b[2J\x1b]0;owned\x07 [red]x[/nope] \u202e\x9b The answer is 42."
    for env in ({"NO_COLOR": "1"}, {"NO_COLOR": "", "FORCE_COLOR": "1", "COLORTERM": "truecolor"}):
        text = good("trace", "-m", folder, "-p", PROMPT, "-r", evil, "--no-chat", env=env).stdout
        rest = re.sub(r"\x1b\[[\d;]*m", "", text)
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", rest)


def test_a_long_prompt_is_shortened_on_the_terminal(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "SHOWN_PROMPT", 6)
    colours = {"NO_COLOR": "", "FORCE_COLOR": "1"}
    text = re.sub(r"\x1b\[[\d;]*m", "", good(*trace(folder), env=colours).stdout)
    assert re.search(r"<\|user\|>.* \.\.\. \d+ tokens \.\.\. .*<\|assistant\|>6 times 7", text, re.S)
    assert PROMPT not in text


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["-p", PROMPT], "give --response or --response-file"),
        (["-r", RESPONSE], "give --prompt or --prompt-file"),
        (["-p", PROMPT, "--prompt-file", "x", "-r", RESPONSE], "not both"),
        (["-p", PROMPT, "--jsonl", "x"], "leave out --prompt"),
        (["--response-file", "r", "--jsonl", "x"], "leave out --prompt"),
        (["--jsonl", "x", "--line", "0"], "--line"),
        (["-p", PROMPT, "-r", RESPONSE, "--layers", "upper"], "layer numbers like 10,11,12"),
        (["-p", PROMPT, "-r", RESPONSE, "--edges", "most"], "a threshold like 1/1024"),
        (["-p", PROMPT, "-r", RESPONSE, "--edges", "1/0"], "a threshold like 1/1024"),
        (["-p", PROMPT, "-r", RESPONSE, "--edges", "mass:2"], "must be in (0, 1]"),
        (["-p", PROMPT, "-r", RESPONSE, "--edges", "top:-1"], "whole number >= 0"),
        (["-p", PROMPT, "-r", RESPONSE, "--answer", "box"], "auto, boxed, ####"),
        (["-p", PROMPT, "-r", RESPONSE, "--answer-regex", "("], "no regular expression"),
        (["-p", PROMPT, "-r", RESPONSE, "--solver", "magic"], "scatter, scipy, blocks, sweep, reference"),
        (["-p", PROMPT, "-r", RESPONSE, "--backend", "gpu"], "auto, torch, torch_scatter, cupy, triton"),
        (["-p", PROMPT, "-r", RESPONSE, "--mode", "fast"], "is not one of auto, edges"),
        (["-p", PROMPT, "-r", RESPONSE, "--mode", "exact", "--solver", "scipy"], "has a solver of its own"),
        (["-p", PROMPT, "-r", RESPONSE, "--question", "all"], "prompt, user"),
        (["-p", PROMPT, "-r", RESPONSE, "--no-answer", "none"], "uniform, tail"),
        (["-p", PROMPT, "-r", RESPONSE, "--tail-tokens", "0"], "--tail-tokens"),
        (["-p", PROMPT, "-r", RESPONSE, "--max-tokens", "1"], "--max-tokens"),
        (["-p", PROMPT, "-r", RESPONSE, "--temperature", "0"], "temperature must be > 0"),
        (["-p", PROMPT, "-r", RESPONSE, "--top", "0"], "top must be in (0, 1]"),
        (["-p", PROMPT, "-r", RESPONSE, "--gain", "nan"], "gain must be finite"),
        (["-p", PROMPT, "-r", RESPONSE, "--device", "toaster"], "use auto, cpu, cuda"),
        (["-p", PROMPT, "-r", RESPONSE, "--tepid"], "--tepid"),
    ],
)
def test_wrong_usage_is_2(folder: Path, arguments: list[str], hint: str) -> None:
    message = " ".join(re.sub(r"[│╭╮╰╯─]", " ", refused(2, "trace", "-m", folder, *arguments)).split())
    assert hint in message


def test_no_command_and_no_model_are_wrong_usage() -> None:
    assert invoke().exit_code == 2
    assert "--model" in refused(2, "trace", "-p", PROMPT, "-r", RESPONSE)
    assert invoke("tarce").exit_code == 2


def test_what_cannot_be_done_is_1_in_one_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_bytes(b"\n")
    (tmp_path / "in.jsonl").write_text('{"prompt": "p"}\n')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    here: list[str | Path] = ["trace", "-m", folder]
    cases: list[tuple[list[str | Path], str]] = [
        (["trace", "-m", "./nowhere", "-p", "p", "-r", "r"], "--model ./nowhere: there is no such folder"),
        (["trace", "-m", tmp_path, "-p", "p", "-r", "r"], "has no config.json"),
        (["trace", "-m", tmp_path / "broken", "-p", "p", "-r", "r"], "cannot be loaded"),
        (["trace", "-m", "no-one/nothing", "-p", "p", "-r", "r"], "--model no-one/nothing cannot be loaded"),
        ([*here, "-p", "p", "-r", ""], "the response is empty"),
        ([*here, "-p", " ", "-r", "r"], "the prompt is empty"),
        ([*here, "-p", "p", "--response-file", tmp_path / "none.txt"], f"No such file or directory: {tmp_path}"),
        ([*here, "-p", "p", "--response-file", tmp_path / "latin.txt"], "is not UTF-8: byte 3 is 0xe9"),
        ([*here, "-p", "p", "--response-file", tmp_path / "empty.txt"], "the response is empty"),
        ([*here, "--jsonl", tmp_path / "none.jsonl"], "No such file or directory"),
        ([*here, "--jsonl", tmp_path / "in.jsonl"], "no response"),
        ([*here, "--jsonl", tmp_path / "in.jsonl", "--line", "9"], "has no line 9; its last one is 1"),
        ([*trace(folder), "--layers", "7"], "7"),
        ([*trace(folder), "--device", "cuda:99"], "there is no device cuda:99 here"),
        ([*trace(folder), "--backend", "triton", "--device", "cpu"], "needs a GPU"),
        ([*trace(folder), "--edges", "top:0"], "keeps no edge"),
        ([*trace(folder), "--html", tmp_path], "Is a directory"),
        ([*here, "-p", "p " * 500, "-r", RESPONSE], "more than the 128 that the model can see"),
        ([*trace(folder), "--max-tokens", "20"], "more than the 20"),
    ]
    for arguments, reason in cases:
        message = refused(1, *arguments)
        assert reason in message, message
        assert len([line for line in message.splitlines() if line.startswith("error")]) == 1


def test_what_is_read_is_never_written_over(folder: Path, rows: Path) -> None:
    text = rows.with_name("text.txt")
    text.write_text(PROMPT)
    before = rows.read_bytes()
    cases: list[tuple[list[str | Path], str]] = [
        (["trace", "--jsonl", rows, "--json", rows], "--json"),
        (["trace", "--jsonl", rows, "--html", rows.parent / "." / rows.name], "--html"),
        (["trace", "--prompt-file", text, "-r", RESPONSE, "--json", text], "--json"),
        (["trace", "-p", PROMPT, "--response-file", text, "--html", text], "--html"),
        (["stability", rows, "--json", rows], "--json"),
    ]
    for arguments, name in cases:
        assert re.search(f"{name} .* is one of the files to read", refused(1, *arguments, "-m", folder))
    assert (rows.read_bytes(), text.read_text()) == (before, PROMPT)


def test_chat_needs_a_template(folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = None
    LlamaForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert "has no chat template" in refused(1, *trace(tmp_path, "--chat"))
    shown = json.loads(good(*trace(tmp_path, "--json", "-")).stdout)
    assert "".join(shown["tokens"]["text"]) == PROMPT + RESPONSE


def test_a_traceback_only_for_those_who_ask(folder: Path) -> None:
    bad = ["trace", "-m", str(folder), "-p", "p", "-r", ""]
    for arguments, env in (([*bad, "--traceback"], {}), (bad, {"FLOWGRAPH_TRACEBACK": "1"})):
        result = invoke(*arguments, env=env)
        assert result.exit_code == 1
        assert isinstance(result.exception, ValueError)


def test_a_bug_says_its_type(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise KeyError("gone")

    monkeypatch.setattr(Tracer, "__call__", broken)
    assert "error: KeyError: 'gone' (--traceback shows where)" in refused(1, *trace(folder))


def test_ctrl_c_is_130(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Tracer, "__call__", stop)
    assert "stopped" in refused(130, *trace(folder))


# ------------------------------------------------------------------------- score


ROWS: list[dict[str, Any]] = [
    {"prompt": PROMPT, "response": RESPONSE, "id": "a"},
    {"question": PROMPT, "response": "I do not know", "id": 2},
    {"messages": [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": RESPONSE}]},
]
BAD: list[tuple[bytes, str]] = [
    (b'{"prompt": ', "not JSON"),
    (b'{"prompt": "caf\xe9", "response": "r"}', "not UTF-8"),
    (b'{"prompt": "p", "response": ""}', '"response" is empty'),
    (json.dumps({"prompt": "p " * 500, "response": RESPONSE}).encode(), "more than the 128"),
    (b'{"prompt_ids": [1], "response_ids": [99999]}', "token id 99999 is unknown"),
    (b'{"messages": [{"role": "user", "content": "p"}]}', "must be an assistant one"),
    (b'{"messages": [{"role": "elf", "content": "p"}], "response": "r"}', "no such role: elf"),
    (b'{"messages": [{"role": "user", "content": null}, {"role": "assistant", "content": 7}]}', "must be text"),
]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)) + "\n")
    return path


def test_score_gives_each_response_its_credits(folder: Path, tokenizer: Any, rows: Path) -> None:
    out = rows.with_name("out.parquet")
    result = good("score", rows, out, "-m", folder, "--rule", "proportional", "--reproducible")
    assert "3 rows" in result.stdout
    assert "no_answer: 1 of 3 rows" in result.stdout
    table = pq.read_table(out)
    assert table.schema.metadata[b"flowgraph.model"] == str(folder).encode()
    assert json.loads(table.schema.metadata[b"flowgraph.options"])["rule"] == "proportional"
    assert set(table.schema.metadata) >= {b"flowgraph.version"}
    frame = pd.read_parquet(out)
    assert frame["line"].tolist() == [1, 2, 3]
    assert table["id"].to_pylist() == ["a", "2", None]
    assert table["answer"].to_pylist() == ["42", None, "42"]
    assert [list(flags) for flags in frame["flags"]][::2] == [[], []]
    assert "no_answer" in frame["flags"][1]
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = Tracer(model, tokenizer, rule="proportional")([{"role": "user", "content": PROMPT}], RESPONSE)
    response = expected.graph.response_mask
    for number in (0, 2):
        row = frame.iloc[number]
        assert row["response_token_ids"].tolist() == expected.graph.token_ids[response].tolist()
        assert row["weights"].tolist() == expected.weights[response].tolist()
        assert row["throughput"].tolist() == expected.throughput[response].tolist()
        assert row["reach"].tolist() == expected.reach[response].tolist()
        assert row["response_tokens"] == int(response.sum())
        assert row["prompt_tokens"] == int(expected.graph.prompt_mask.sum())
    assert set(frame["weights"][1]) == {1.0}


def test_bad_lines_are_set_aside_and_the_run_goes_on(folder: Path, tmp_path: Path) -> None:
    path, out = tmp_path / "in.jsonl", tmp_path / "out.parquet"
    path.write_bytes(b"\n".join([line for line, _ in BAD] + [b"", json.dumps(ROWS[0]).encode()]))
    result = invoke("score", path, out, "-m", folder)
    assert result.exit_code == 3, result.output
    assert f"set aside: {len(BAD)} of {len(BAD) + 1} lines, see {out}.errors.jsonl" in result.stdout
    assert pd.read_parquet(out)["line"].tolist() == [len(BAD) + 2]
    errors = [json.loads(line) for line in Path(f"{out}.errors.jsonl").read_text().splitlines()]
    assert [error["line"] for error in errors] == list(range(1, len(BAD) + 1))
    for error, (_, reason) in zip(errors, BAD, strict=True):
        assert reason in error["reason"]


def test_a_file_of_bad_lines_alone_gives_an_empty_table(folder: Path, tmp_path: Path) -> None:
    path, out = tmp_path / "in.jsonl", tmp_path / "out.parquet"
    path.write_bytes(BAD[0][0])
    assert invoke("score", path, out, "-m", folder, "-q").exit_code == 3
    assert len(pd.read_parquet(out)) == 0


def test_score_refuses_before_it_loads_a_model(rows: Path, tmp_path: Path) -> None:
    empty, blank, old = tmp_path / "empty.jsonl", tmp_path / "blank.jsonl", tmp_path / "old.parquet"
    empty.write_bytes(b"")
    blank.write_bytes(b"\n \n")
    old.write_bytes(b"old")
    missing = "./nowhere"  # would be complained about, if it came to that
    for source, out, reason in (
        (tmp_path / "none.jsonl", tmp_path / "o", "IN: there is no file"),
        (tmp_path, tmp_path / "o", "one is in the other"),
        (tmp_path, tmp_path / "o.parquet", "is a folder: OUT has to be one, too"),
        (empty, tmp_path / "o", "is empty: there is no line to score"),
        (rows, old, "exists; --overwrite replaces it"),
        (rows, tmp_path, "is a folder of something else"),
        (rows, rows, "is a file; the name of one must end in .parquet"),
    ):
        assert reason in refused(1, "score", source, out, "-m", missing)
    for name in ("scores.csv", "scores.JSON", "scores.pq"):
        message = " ".join(re.sub(r"[│╭╮╰╯─]", " ", refused(2, "score", rows, tmp_path / name, "-m", missing)).split())
        assert "the name of one file must end in .parquet" in message
        assert not (tmp_path / name).exists()
    rows.rename(same := tmp_path / "same.parquet")
    assert "same file" in refused(1, "score", same, same, "-m", missing, "--overwrite")
    assert old.read_bytes() == b"old"
    assert not (tmp_path / "o").exists()


def test_blank_lines_alone_are_no_input(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b"\n \n")
    assert "there is no line to score" in refused(1, "score", tmp_path / "in.jsonl", tmp_path / "o", "-m", folder)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_overwrite(folder: Path, rows: Path) -> None:
    out = rows.with_name("out.parquet")
    out.write_bytes(b"old")
    assert good("score", rows, out, "-m", folder, "--overwrite", "-q").output == ""
    assert len(pd.read_parquet(out)) == 3


def test_a_folder_goes_on_with_the_backend_that_it_was_begun_with(folder: Path, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores"
    command: list[str | Path] = ["score", rows, out, "-m", folder, "--device", "cpu"]
    invoke(*command, "--backend", "torch", "-q")
    before = {path: path.read_bytes() for path in out.rglob("*.parquet")}
    assert before
    message = refused(1, *command)
    assert "was begun otherwise" in message and "backend" in message
    invoke(*command, "--backend", "torch", "-q")
    assert before == {path: path.read_bytes() for path in out.rglob("*.parquet")}


def test_options_that_no_row_could_be_traced_with_stop_the_run(folder: Path, rows: Path) -> None:
    out = rows.with_name("out.parquet")
    assert "7" in refused(1, "score", rows, out, "-m", folder, "--layers", "7")
    refused(2, "score", rows, out, "-m", folder, "--top", "2")
    assert list(rows.parent.iterdir()) == [rows]


def test_an_exception_in_the_middle_leaves_no_out(folder: Path, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flowgraph.adapters.records import ScoreFile

    def full(self: ScoreFile, row: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ScoreFile, "add", full)
    assert "No space left" in refused(1, "score", rows, rows.with_name("out.parquet"), "-m", folder)
    assert list(rows.parent.iterdir()) == [rows]


def test_a_log_gets_a_line_now_and_then(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = cli._Done()
    with terminal.progress(rows.stat().st_size, done, quiet=False, every=0) as advance:
        done.rows = 5
        advance(10)
    assert "5 rows, " in capsys.readouterr().err
    with terminal.progress(rows.stat().st_size, done, quiet=True, every=0) as advance:
        advance(10)
    assert capsys.readouterr().err == ""


# ------------------------------------------------------------------------- as a program


def test_the_program_keeps_stdout_for_results(folder: Path) -> None:
    done = program(*trace(folder, "--json", "-"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["answer"]["text"] == "42"
    assert done.stderr == ""


def test_stdin_and_a_terminal_of_ascii(folder: Path) -> None:
    arguments: list[str | Path] = ["trace", "-m", folder, "-p", PROMPT, "--response-file", "-", "--no-chat"]
    done = program(*arguments, input="é: the answer is 42\n", env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert "Top tokens" in done.stdout


def test_the_program_says_errors_in_one_line() -> None:
    done = program("trace", "-m", "./nowhere", "-p", "p", "-r", "r")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: --model ./nowhere: there is no such folder\n"


@pytest.mark.parametrize(("how", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopping_score_leaves_no_out(folder: Path, tmp_path: Path, how: signal.Signals, code: int) -> None:
    path, out = tmp_path / "in.jsonl", tmp_path / "out.parquet"
    path.write_text((json.dumps(ROWS[0]) + "\n") * 200_000)
    command = [sys.executable, "-m", "flowgraph.cli", "score", str(path), str(out), "-m", str(folder)]
    with subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Where the tests run in the background, a shell has them ignore Ctrl-C, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as running:
        deadline = time.monotonic() + 300
        while not list(tmp_path.glob(".*.partial")) and time.monotonic() < deadline:
            assert running.poll() is None
            time.sleep(0.1)
        running.send_signal(how)
        output = running.communicate(timeout=120)
    assert running.returncode == code, output
    assert "Traceback" not in output[1]
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


def test_score_tells_what_it_passes_over(folder: Path, rows: Path) -> None:
    (rows.parent / "more.jsonl.gz").write_bytes(b"")
    out = rows.parent.with_name("scores of a folder")
    result = good("score", rows.parent, out, "-m", folder)
    assert "passed over in" in result.stderr
    assert "passed over: 1 file (.gz)" in result.stdout
    assert good("score", rows.parent, out, "-m", folder, "-q").output == ""
    assert "files that can be read end in .jsonl" in refused(
        1, "score", rows.parent / "more.jsonl.gz", out, "-m", folder
    )


def test_parts_with_graphs_are_small(folder: Path, rows: Path, tmp_path: Path) -> None:
    rows.write_text((json.dumps(ROWS[0]) + "\n") * 33)
    for arguments, parts in (([], 2), (["--shard-rows", "33"], 1)):
        out = tmp_path / f"out{parts}"
        good("score", rows, out, "-m", folder, "--graphs", "-q", *arguments)
        assert len(list(out.glob("part-*"))) == len(list((out / "_graphs").iterdir())) == parts


def test_workers_get_the_whole_path_of_a_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    assert cli_options.place_of(folder.name) == str(folder)
    assert cli_options.place_of("Qwen/Qwen3-4B") == "Qwen/Qwen3-4B"


# ------------------------------------------------------------------------- report


def data_of(page: Path) -> list[dict[str, Any]]:
    """The traces in a page."""
    found = re.search(r'<script type="application/json"[^>]*>(.*?)</script>', page.read_text(), re.S)
    assert found
    data = json.loads(found[1])
    return data if isinstance(data, list) else data["traces"]


def test_report_puts_lines_of_a_file_on_one_page(folder: Path, rows: Path) -> None:
    page = rows.with_name("page.html")
    result = good("report", rows, page, "-m", folder, "--lines", "1,3", "--title", "Two of three")
    assert f"2 traces on one page: {page}" in result.stdout
    assert page.as_uri() in result.stdout.replace("\n", "")
    assert [trace["title"] for trace in data_of(page)] == ["line 1, a", "line 3"]
    assert "<title>Two of three</title>" in page.read_text()
    assert good("report", rows, page, "-m", folder, "-q").output == ""
    assert len(data_of(page)) == 3


def test_report_of_a_prompt_and_response(folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    good("report", page, "-m", folder, "-p", PROMPT, "-r", RESPONSE, "--by", "words")
    assert data_of(page)[0]["segments"]["by"] == "words"


def test_the_page_of_trace_is_that_of_report(folder: Path, tmp_path: Path) -> None:
    """Also where the graph lists only a part of what flows: both look at the whole attention."""
    pages = [tmp_path / "trace.html", tmp_path / "report.html"]
    how: list[str | Path] = ["-m", folder, "-p", PROMPT, "-r", RESPONSE, "--mode", "exact", "--edges", "top:1", "-q"]
    good("trace", *how, "--html", pages[0])
    good("report", pages[1], *how)
    (one,), (other,) = map(data_of, pages)
    assert one["segments"] == other["segments"]
    assert one["checkpoints"] == other["checkpoints"]


def test_report_refuses(folder: Path, rows: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    texts: list[str | Path] = ["-p", PROMPT, "-r", RESPONSE]
    for arguments, hint in (
        ([rows, page, page], "not 3 files"),
        ([rows, page, *texts], "IN has prompts and responses"),
        ([page, *texts, "--lines", "1"], "--lines needs IN"),
        ([page, "-p", PROMPT], "give --response or --response-file, or IN"),
        ([rows, page, "--lines", "0"], "is not lines like 1,5,8-10"),
        ([rows, page, "--lines", "3-1"], "is not lines like 1,5,8-10"),
        ([rows, page, "--by", "pages"], "sentences, words"),
        ([rows, rows], "the page comes last and ends in .html"),
        ([page, rows], "the page comes last and ends in .html"),
        ([rows, *texts], "the page comes last and ends in .html"),
    ):
        message = " ".join(re.sub(r"[│╭╮╰╯─]", " ", refused(2, "report", *arguments, "-m", folder)).split())
        assert hint in message
    bad, many = tmp_path / "bad.jsonl", tmp_path / "many.jsonl"
    bad.write_bytes(BAD[0][0])
    many.write_text((json.dumps(ROWS[0]) + "\n") * 21)
    long = tmp_path / "long.jsonl"
    long.write_bytes(BAD[3][0])
    (tmp_path / "folder.html").mkdir()
    (odd := tmp_path / "rows.html").write_bytes(before := rows.read_bytes())
    for arguments, hint in (
        ([tmp_path / "none.jsonl", page], "IN: there is no file"),
        ([rows, tmp_path / "folder.html"], "is a folder"),
        ([odd, odd], "is one of the files to read"),
        ([odd, "--prompt-file", odd, "-r", RESPONSE], "is one of the files to read"),
        ([rows, page, "--lines", "1,7-9"], "has no line 7-9"),
        ([many, page], "more than 20 lines: choose some"),
        ([bad, page], f"line 1 of {bad}: not JSON"),
        ([long, page], "line 1: the trace: input_ids has"),
    ):
        assert hint in refused(1, "report", *arguments, "-m", folder)
    assert not page.exists()
    assert rows.read_bytes() == odd.read_bytes() == before


# ------------------------------------------------------------------------- measures and compare


LABELLED: list[dict[str, Any]] = [
    {"prompt": PROMPT, "response": f"{n} times 7 is {7 * n}, {'so' * (n % 3)} that is it. The answer is {7 * n}.",
     "id": f"r{n}", "right": n % 2 == 0, "problem": n // 2, "guess": n / 4}
    for n in range(8)
]  # fmt: skip


@pytest.fixture(scope="module")
def scored(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(the lines, their scores with measures); the last has no answer."""
    place = tmp_path_factory.mktemp("scored")
    source, out = place / "in.jsonl", place / "scores.parquet"
    last = LABELLED[-1] | {"response": "I do not know"}
    source.write_text("\n".join(map(json.dumps, [*LABELLED[:-1], last])))
    good("score", source, out, "-m", folder, "--measures", "-q", "--reproducible")
    return source, out


def test_score_adds_measures(folder: Path, tokenizer: Any, scored: tuple[Path, Path]) -> None:
    table = pq.read_table(scored[1])
    assert table.column_names[-len(MEASURES) :] == list(MEASURES)
    assert {str(table.schema.field(name).type) for name in MEASURES} == {"double"}
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    trace = Tracer(model, tokenizer)([{"role": "user", "content": PROMPT}], LABELLED[2]["response"])
    expected = measures(trace.flow, [trace.text])
    row = table.slice(2, 1).to_pylist()[0]
    for name in MEASURES:
        value = float(expected[name])
        assert row[name] == (pytest.approx(value, rel=1e-9) if value == value else None), name
    assert table["digit_share"].null_count == 1, "a trace without flow has no measures"
    assert table["gini"].to_pylist()[-1] is None


def test_compare_by_a_label(scored: tuple[Path, Path], tmp_path: Path) -> None:
    source, scores = scored
    out = tmp_path / "new" / "out.json"
    asked: list[str | Path] = ["compare", scores, "--labels", source, "--by", "right", "--also", "guess"]
    result = good(*asked, "--out", out, "--resamples", "200")
    assert "right=true: 4 traces | right=false: 4 traces" in result.stdout
    found = json.loads(out.read_text())
    assert found["names"] == ["right=true", "right=false"]
    by_name = {one["measure"]: one for one in found["measures"]}
    assert set(by_name) == {*MEASURES, "prompt_tokens", "response_tokens", "guess"}
    assert by_name["guess"]["mean"] == [0.75, 1.0]
    assert by_name["gini"]["missing"] == [0, 1]
    gini = pq.read_table(scores)["gini"].to_pylist()
    assert by_name["gini"]["mean"][0] == pytest.approx(sum(gini[0:7:2]) / 4)
    top = by_name["guess"]["examples"][1][0]
    assert (top["label"], top["value"]) == ({"line": 8, "id": "r7"}, 1.75)
    for word in ("AUC", "95% interval", "gini", "guess"):
        assert word in result.stdout
    few = good(*asked, "--only", "guess,gini", "--examples", "1", "--resamples", "200").stdout
    assert "width_mean" not in few
    assert "guess  right=true: line 1 (0) | right=false: line 8 (1.75)" in few
    by_id = good(*asked, "--join", "id", "-q", "--out", tmp_path / "same.json", "--resamples", "200")
    assert by_id.output == ""
    assert json.loads((tmp_path / "same.json").read_text()) == found
    swapped = good(*asked, "--groups", "false,true", "--only", "guess", "--resamples", "200").stdout
    assert "right=false: 4 traces | right=true: 4 traces" in swapped


def test_compare_pairs(scored: tuple[Path, Path], tmp_path: Path) -> None:
    source, scores = scored
    result = good("compare", scores, "--labels", source, "--by", "right", "--pair", "problem", "--resamples", "200")
    assert "4 pairs; without a partner: 0, 0" in result.stdout
    ends = re.search(r"highest differences: problem (\d) \((.*?)\).* \| lowest: problem (\d) \((.*?)\)", result.stdout)
    assert ends and float(ends[2]) >= float(ends[4]) and ends[1] != ends[3]
    assert not re.search("^problem", result.stdout, re.M), "the key is no measure"
    copy = tmp_path / "scores.parquet"
    pq.write_table(pq.read_table(scores).slice(2), copy)
    table = tmp_path / "out.parquet"
    result = good(
        "compare", scores, copy, "--pair", "id", "--out", table, "--resamples", "200", "--test", "permutation"
    )
    assert "6 pairs; without a partner: 2, 0" in result.stdout
    assert f"{scores}: 8 traces" in result.stdout, "by their whole names, where these are else the same"
    found = pq.read_table(table)
    assert set(found["difference"].to_pylist()) <= {0.0, None}
    assert set(found["p"].to_pylist()) <= {1.0, None}


def test_compare_says_what_is_missing(rows: Path, folder: Path, scored: tuple[Path, Path], tmp_path: Path) -> None:
    _, scores = scored
    plain = tmp_path / "plain.parquet"
    good("score", rows, plain, "-m", folder, "-q")
    result = good("compare", plain, plain, "--resamples", "50")
    assert "flowgraph score --measures puts them there" in result.stderr
    mixed = good("compare", scores, plain, "--resamples", "50").stdout
    assert "in one file only: path_length_mean" in mixed
    three = tmp_path / "three.jsonl"
    three.write_text("\n".join(json.dumps(row | {"kind": "abc"[n % 3]}) for n, row in enumerate(LABELLED)))
    asked: list[str | Path] = ["compare", scores, "--labels", three, "--by", "kind", "--resamples", "50"]
    assert "must have two values, it has 3: a (3), b (3), c (2)" in refused(1, *asked)
    assert "3 rows are in neither group" in good(*asked, "--groups", "b,c").stderr


def test_compare_of_a_folder_leaves_out_where_a_row_is_from(folder: Path, rows: Path, tmp_path: Path) -> None:
    out, table = tmp_path / "scores", tmp_path / "found.json"
    good("score", rows, out, "-m", folder, "-q")
    asked: list[str | Path] = ["compare", out, out, "--resamples", "50", "--out", table]

    def compared(*more: str | Path) -> list[str]:
        good(*asked, *more)
        return [one["measure"] for one in json.loads(table.read_text())["measures"]]

    assert compared() == ["prompt_tokens", "response_tokens"]
    assert "flowgraph score --measures puts them there" in good(*asked).stderr
    assert compared("--only", "lost,choice") == ["lost", "choice"]


@pytest.mark.parametrize("columns", ["40", "80"])
def test_tables_of_numbers_stay_whole_where_there_is_little_room(
    scored: tuple[Path, Path], folder: Path, columns: str
) -> None:
    """As in a pipe, which has 80 columns; the longest names are folded, no number is."""
    source, scores = scored
    long = {f"the rather long name of group {name}": name for name in "ab"}
    labels = source.with_name("long.jsonl")
    labels.write_text(
        "\n".join(json.dumps({"id": row["id"], "group": [*long][n % 2]}) for n, row in enumerate(LABELLED))
    )
    env = {"COLUMNS": columns}
    asked: list[str | Path] = ["compare", scores, "--labels", labels, "--by", "group", "--resamples", "50"]
    shown = good(*asked, env=env).stdout
    found = re.search(r"^sink_share +(\S+) +(\S+) +(\S+) +(\S+ \.\. \S+) +(\S+) +(\S+) +(\S+) +(\d, \d)$", shown, re.M)
    assert found, shown
    assert float(found[1]) - float(found[2]) == pytest.approx(float(found[3]), abs=0.01)
    shown = good("stability", "-m", folder, "-p", PROMPT, "-r", RESPONSE, "--vary", "edges,heads", env=env).stdout
    assert re.search(r"^changed +to +rank correlation +overlap of top 40%", shown, re.M), shown
    assert re.search(r"^edges +1/64 +\S+ +\d+% *$", shown, re.M), shown


def test_compare_refuses(scored: tuple[Path, Path], tmp_path: Path) -> None:
    source, scores = scored
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(json.dumps(row | {"id": "x"}) for row in LABELLED))
    usage: list[tuple[list[str | Path], str]] = [
        ([scores], "give a second file, or --by"),
        ([scores, scores, scores], "not 3 files"),
        ([scores, scores, "--by", "answer"], "go with one file"),
        ([scores, "--by", "answer", "--also", "guess"], "--also needs --labels"),
        ([scores, "--by", "answer", "--groups", "a"], "--groups takes two values"),
        ([scores, "--by", "answer", "--only", "a,,b"], "is not different names"),
        ([scores, "--by", "answer", "--out", "out.csv"], "must end in .json or .parquet"),
        ([scores, scores, "--test", "t"], "rank, permutation"),
    ]
    for arguments, hint in usage:
        assert hint in " ".join(re.sub(r"[│╭╮╰╯─]", " ", refused(2, "compare", *arguments)).split())
    cannot: list[tuple[list[str | Path], str]] = [
        ([scores, tmp_path / "none.parquet"], "there is no file"),
        ([scores, source], "is no Parquet file"),
        ([scores, "--by", "right"], "there is no column 'right'"),
        ([scores, scores, "--pair", "problem"], "--pair problem: there is no such column"),
        ([scores, scores, "--only", "girth"], "--only girth: no such numbers"),
        ([scores, scores, "--confidence", "2"], "confidence must be in (0, 1)"),
        ([scores, "--labels", other, "--by", "right"], "it is another file"),
        ([scores, scores, "--out", scores], "is one of the files to read"),
    ]
    for arguments, hint in cannot:
        assert hint in refused(1, "compare", *arguments)


# ------------------------------------------------------------------------- stability


def test_stability_of_one_trace(folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    from flowgraph.stability import stability

    out = tmp_path / "new" / "out.json"
    asked: list[str | Path] = ["stability", "-m", folder, "-p", PROMPT, "-r", RESPONSE, "--seed", "3"]
    result = good(*asked, "--json", out)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = stability(Tracer(model, tokenizer), [{"role": "user", "content": PROMPT}], RESPONSE, seed=3).to_dict()
    found = json.loads(out.read_text())
    assert {name: found[name] for name in expected} == expected
    assert found["options"]["layers"] == "middle"
    for word in ("1/1024", "early third", "half 4b", "paper", "finds nothing", "user", "overlap of top 40%"):
        assert word in result.stdout
    assert re.search(r"Two halves of heads agree by a mean rank correlation of \d\.\d{3}", result.stdout)
    few = good(*asked, "--vary", "preset", "--top", "0.2").stdout
    assert "overlap of top 20%" in few and "1/64" not in few
    assert json.loads(good(*asked, "--vary", "preset", "--json", "-").stdout)["variants"][0]["name"] == "paper"
    assert "no_answer: " in good("stability", "-m", folder, "-p", PROMPT, "-r", "I do not know").stdout


def test_stability_of_a_file_sets_bad_lines_aside(folder: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.json"
    ids = {"prompt_ids": [5, 6, 7], "response_ids": [8, 9]}
    good_lines = [json.dumps(ROWS[0]), json.dumps(ROWS[1]), json.dumps(ids)]
    source.write_bytes("\n".join(good_lines).encode() + b"\n" + BAD[0][0] + b"\n" + json.dumps(ROWS[2]).encode())
    asked: list[str | Path] = ["stability", source, "-m", folder, "--vary", "edges,answer"]
    result = invoke(*asked, "--json", out)
    assert result.exit_code == 3, result.output
    assert "line 4 set aside: not JSON" in result.stderr
    assert "4 traces, 2 without an answer left out" in result.stdout
    found = json.loads(out.read_text())
    assert [trace["line"] for trace in found["traces"]] == [1, 2, 3, 5]
    assert [bad["line"] for bad in found["set_aside"]] == [4]
    row = next(row for row in found["summary"] if row["name"] == "1/64")
    values = [variant["spearman"] for trace in found["traces"] for variant in trace["variants"][:1]]
    assert row["n"] == 2
    assert row["spearman"][0] == pytest.approx(sum(values) / 2)
    result = good(*asked, "--lines", "1-2,5")
    assert "3 traces, 1 without an answer" in result.stdout


def test_stability_refuses(folder: Path, rows: Path) -> None:
    asked: list[str | Path] = ["stability", "-m", folder]
    usage: list[tuple[list[str | Path], str]] = [
        ([], "give --prompt or --prompt-file, or IN"),
        ([rows, "-p", PROMPT], "IN has prompts and responses"),
        ([rows, "--vary", "colour"], "--vary colour: there are edges, layers"),
        ([rows, "--halves", "0"], "--halves"),
    ]
    for arguments, hint in usage:
        assert hint in " ".join(re.sub(r"[│╭╮╰╯─]", " ", refused(2, *asked, *arguments)).split())
    assert "has no line 9" in refused(1, *asked, rows, "--lines", "9")
    assert "there is no file" in refused(1, *asked, "nowhere.jsonl")


# ------------------------------------------------------------------------- doctor


def test_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    result = good("doctor")
    for word in (
        "torch-geometric",
        "transformers",
        "cpu",
        "cuda",
        "solver scatter",
        "solver scipy",
        "mode exact",
        "capture",
    ):
        assert word in result.stdout
    assert "OK: everything" in result.stdout
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert 'pip install "flowgraph-llm[scatter]"' in good("doctor").stdout


def test_doctor_finds_a_solver_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    right = SOLVERS["scatter"]

    def wrong(system: System) -> Solution:
        return replace(right(system), flow=right(system).flow * 1.01)

    monkeypatch.setitem(SOLVERS, "scatter", wrong)
    result = invoke("doctor")
    assert result.exit_code == 1
    assert re.search(r"solver scatter +WRONG", result.stdout)
    assert re.search(r"solver scipy +OK", result.stdout)
    assert "1 of the self-tests went wrong" in result.stderr
    assert "OK: everything" not in result.stdout


def test_doctor_finds_an_exact_mode_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    for factor in (1.01, float("nan")):

        def wrong(*args: Any, by: float = factor, **kwargs: Any) -> Flow:
            flow = exact_flow(*args, **kwargs)
            return replace(flow, reach=flow.reach * by)

        monkeypatch.setattr("flowgraph.tracer.exact_flow", wrong)
        result = invoke("doctor")
        assert result.exit_code == 1
        assert re.search(r"mode exact +WRONG", result.stdout)
        assert "1 of the self-tests went wrong" in result.stderr


def test_doctor_needs_required_packages_only() -> None:
    """With pandas, gguf and everything else that is optional out of reach."""
    code = (
        "import sys\n"
        "for name in ('pandas', 'gguf', 'torch_scatter', 'cupy', 'triton', 'plotly', 'ray', 'trl', 'hypothesis'):\n"
        "    sys.modules[name] = None\n"
        "from flowgraph.cli import main; sys.argv = ['flowgraph', 'doctor']; main()"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "OK: everything" in done.stdout


# ------------------------------------------------------------------------- demo


def test_demo_without_gguf_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOWGRAPH_CACHE", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = invoke("demo", "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "flowgraph-llm[demo]" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.real
def test_demo(smollm2: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2_source, "load", lambda dtype, say: smollm2)
    result = good("demo", "--out", tmp_path / "out")
    page = tmp_path / "out" / "demo.html"
    assert str(page) in result.stdout
    assert page.as_uri() in result.stdout
    assert "Top tokens" in result.stdout
    items = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert len(items) == 4
    assert [item["answer"]["text"] for item in items[:3]] == ["18", "8", "85"]
    assert all(item["title"] in page.read_text() for item in items)
    assert all(item["summary"]["absorbed"] == pytest.approx(1, rel=1e-4) for item in items[:3])
    assert 0 < items[3]["summary"]["response_tokens"] <= 120


@pytest.mark.real
def test_trace_with_the_model_of_the_demo(smollm2: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2_source, "load", lambda dtype, say: smollm2)
    shown = json.loads(good("trace", "-m", "smollm2", "-p", PROMPT, "-r", RESPONSE, "--json", "-").stdout)
    assert shown["layers"] == list(range(10, 20))
    assert shown["answer"]["text"] == "42"
