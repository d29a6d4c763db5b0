"""The command line: help, exit codes, what is called with what, and what is imported when."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import pytrain
from pytrain.__main__ import main
from pytrain.checkpoint.huggingface import ImportedRun
from pytrain.errors import ExitCode, UserError
from pytrain.metrics import Evaluation
from pytrain.presets import PRESETS

ROOT = Path(__file__).parents[1]
COMMANDS = (
    *("train", "init", "config", "info", "demo", "prepare", "tokenizer", "generate", "evaluate", "export"),
    *("import", "inspect", "bench", "plan", "completion"),
)


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **functions: Any) -> None:
    """Put a module with these functions in place of pytrain.NAME."""
    parent_name, _, last = f"pytrain.{name}".rpartition(".")
    module = ModuleType(f"pytrain.{name}")
    for function_name, function in functions.items():
        setattr(module, function_name, function)
    if parent_name != "pytrain":
        parent = ModuleType(parent_name)
        parent.__path__ = []
        setattr(parent, last, module)
        monkeypatch.setitem(sys.modules, parent_name, parent)
        monkeypatch.setattr(pytrain, parent_name.rpartition(".")[2], parent, raising=False)
    else:
        monkeypatch.setattr(pytrain, last, module, raising=False)
    monkeypatch.setitem(sys.modules, f"pytrain.{name}", module)


class Calls(list[tuple[tuple[Any, ...], dict[str, Any]]]):
    """A function that remembers its calls and gives `result` back."""

    def __init__(self, result: Any = None) -> None:
        self.result = result

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        self.append((arguments, keywords))
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


@dataclass
class Result:
    stopped: bool


@pytest.fixture
def run_toml(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    path = tmp_path / "run.toml"
    assert main(["init", "--preset", "gpt2-tiny", "--out", str(path)]) == ExitCode.OK
    assert capsys.readouterr().out.startswith(f"wrote {path}; next: ")
    return path


def test_help_lists_every_command_with_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == ExitCode.OK
    shown = capsys.readouterr().out
    for command in COMMANDS:
        assert f"\n  {command} " in shown
    assert "pytrain train run.toml --dry-run" in shown
    for code in (ExitCode.BAD_INPUT, ExitCode.STOPPED):
        assert f" {code:d} " in " ".join(shown.split())


@pytest.mark.parametrize("command", [*COMMANDS, "tokenizer train"])
def test_each_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "--help"]) == ExitCode.OK
    shown = capsys.readouterr().out
    assert f"pytrain {command}" in shown
    if "Commands:" in shown:  # none is cut short
        assert "..." not in shown.split("Commands:")[1]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == ExitCode.OK
    assert capsys.readouterr().out == f"pytrain {pytrain.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "No such command 'trian'. Did you mean 'train'?"),
        (["train", "missing.toml"], "error: missing.toml does not exist; `pytrain init"),
        (
            ["config", "model.hiden"],
            'error: "model.hiden" is not a key or section of the configuration; did you mean',
        ),
        (["init", "--preset", "gpt3"], 'error: no preset is called "gpt3"'),
        (["init"], "Missing option '--preset'"),
        (["generate", "x", "--temperature", "-1"], "-1.0 is not in the range x>=0"),
        (["bench", "everything"], 'error: there is no benchmark "everything" in this'),
    ],
)
def test_bad_input_is_a_sentence_and_status_two(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == ExitCode.BAD_INPUT
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert "Traceback" not in captured.err


def test_train_loads_the_file_and_passes_it_on(monkeypatch: pytest.MonkeyPatch, run_toml: Path) -> None:
    train = Calls(Result(stopped=False))
    stand_in(monkeypatch, "train", train=train)
    assert main(["train", str(run_toml), "--set", "run.seed=7", "--set", "batch.global_batch=6"]) == ExitCode.OK
    ((settings,), keywords) = train[0]
    assert (settings.run.seed, settings.batch.global_batch, keywords["resume"]) == (7, 6, "none")
    assert keywords["world"].size == 1


def test_a_run_stopped_by_a_signal_has_its_own_status(monkeypatch: pytest.MonkeyPatch, run_toml: Path) -> None:
    stand_in(monkeypatch, "train", train=Calls(Result(stopped=True)))
    assert main(["train", str(run_toml), "--resume", "auto"]) == 75


def test_a_dry_run_prints_and_does_not_train(
    monkeypatch: pytest.MonkeyPatch, run_toml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = Calls()
    stand_in(monkeypatch, "train", train=train)
    stand_in(monkeypatch, "estimate", report=Calls("124M parameters"))
    assert main(["train", str(run_toml), "--dry-run"]) == ExitCode.OK
    assert capsys.readouterr().out == "124M parameters\n"
    assert train == []


def test_a_wrong_key_is_told_before_training_is_imported(
    monkeypatch: pytest.MonkeyPatch, run_toml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delattr(pytrain, "train", raising=False)
    monkeypatch.setitem(sys.modules, "pytrain.train", None)  # importing it fails
    assert main(["train", str(run_toml), "--set", "run.stpes=3"]) == ExitCode.BAD_INPUT
    assert capsys.readouterr().err == "error: --set run.stpes=3: run.stpes is not a key; did you mean run.steps?\n"


def test_an_error_of_the_library_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, run_toml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch, "train", train=Calls(UserError("data/train.idx is not there")))
    assert main(["train", str(run_toml)]) == ExitCode.BAD_INPUT
    assert capsys.readouterr().err == "error: data/train.idx is not there\n"


def test_an_unexpected_exception_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, run_toml: Path) -> None:
    stand_in(monkeypatch, "train", train=Calls(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        main(["train", str(run_toml)])


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch, run_toml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    stand_in(monkeypatch, "train", train=interrupted)
    assert main(["train", str(run_toml)]) == ExitCode.INTERRUPTED
    assert "interrupted" in capsys.readouterr().err


def test_init_does_not_overwrite(run_toml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = run_toml.read_bytes()
    assert main(["init", "--preset", "demo", "--out", str(run_toml)]) == ExitCode.BAD_INPUT
    assert capsys.readouterr().err == f"error: {run_toml} exists already; give another --out, or remove it\n"
    assert run_toml.read_bytes() == before
    assert main(["init", "--preset", "demo", "--out", str(run_toml.parent / "no" / "run.toml")]) == ExitCode.BAD_INPUT
    assert main(["init", "--preset", "demo", "--out", "-"]) == ExitCode.OK
    assert 'preset = "demo"' in capsys.readouterr().out


def test_config_explains(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "batch.micro_batch"]) == ExitCode.OK
    assert "sets the memory" in capsys.readouterr().out


@dataclass
class Report:
    files: int = 2
    documents: int = 5
    empty_documents: int = 1
    tokens: int = 100
    utf8_bytes: int = 400
    begin_id: int | None = None


def test_prepare(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    prepare = Calls(Report())
    stand_in(monkeypatch, "data.corpus", prepare=prepare)
    words = [
        "prepare",
        "--tokenizer",
        "t.model",
        "--out",
        "data/train",
        "--workers",
        "3",
        "--no-eod",
        "a.txt",
        "b",
    ]
    assert main(words) == ExitCode.OK
    arguments, keywords = prepare[0]
    assert arguments == ((Path("a.txt"), Path("b")), Path("data/train"), Path("t.model"), 3)
    assert (keywords["prepend_bos"], keywords["append_eod"], keywords["text_key"]) == (True, False, "text")
    written = (
        "wrote data/train.bin, .idx and .json: 2 file(s), 5 documents (1 of them empty), 100 tokens, "
        "4.00 bytes per token"
    )
    assert capsys.readouterr().out == f"{written}\n"
    stand_in(monkeypatch, "data.corpus", prepare=Calls(Report(begin_id=7)))
    assert main(words) == ExitCode.OK
    assert capsys.readouterr().out == f"{written}; each begins with token 7 (--no-bos leaves it out)\n"


@dataclass
class MadeTokenizer:
    vocabulary_size: int = 99
    sha256: str = "abc"


def test_tokenizer_train(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    train = Calls(MadeTokenizer())
    stand_in(monkeypatch, "data.tokenizer", train_sentencepiece=train)
    assert main(["tokenizer", "train", "--out", "t.model", "--vocabulary", "99", "--type", "bpe", "a"]) == ExitCode.OK
    assert train[0][0] == ((Path("a"),), Path("t.model"), 99, "bpe")
    assert capsys.readouterr().out == "wrote t.model: 99 tokens, sha256 abc\n"


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_generate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stream: str) -> None:
    generate_text = Calls(iter([" upon", " a", " time"]))
    stand_in(monkeypatch, "generate", generate_text=generate_text)
    assert main(["generate", "runs/a", "--prompt", "Once", "--top-k", "5", stream]) == ExitCode.OK
    assert capsys.readouterr().out == "Once upon a time\n"
    settings = {"tokens": 128, "temperature": 0.8, "top_k": 5, "top_p": 1.0, "seed": 1234, "device": None}
    assert generate_text[0][1].pop("group").size == 1
    assert generate_text[0] == ((Path("runs/a"), "Once"), settings)


def test_evaluate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate_checkpoint = Calls({"news": Evaluation(1.5, 4.48, None)})
    monkeypatch.setattr("pytrain.evaluate.evaluate_checkpoint", evaluate_checkpoint)
    assert main(["evaluate", "runs/a", "--corpus", "data/news", "--batches", "3"]) == ExitCode.OK
    assert capsys.readouterr().out == "news: loss 1.5000 nats/token, perplexity 4.48, bits per byte n/a\n"
    (path, world, corpora), options = evaluate_checkpoint[0]
    assert (path, world.size, corpora) == (Path("runs/a"), 1, ("data/news",))
    assert options == {"tp": 1, "pp": 1, "batches": 3, "device": None}


def test_export_import_inspect_and_demo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run_toml = Path("back/run.toml")
    made = ImportedRun(Path("back/checkpoints/step-000000"), run_toml, Path("back/tokenizer/tokenizer.model"))
    export, import_, demo = Calls(), Calls(made), Calls()
    monkeypatch.setattr("pytrain.checkpoint.huggingface.export_huggingface", export)
    monkeypatch.setattr("pytrain.checkpoint.huggingface.import_huggingface", import_)
    monkeypatch.setattr("pytrain.checkpoint.Checkpoint.open", lambda path: path)
    assert main(["export", "runs/a", "--hf", "out"]) == ExitCode.OK
    assert main(["import", "--hf", "out", "--out", "back"]) == ExitCode.OK
    stand_in(monkeypatch, "checkpoint.inspect", inspect=Calls("3 tensors"))
    assert main(["inspect", "runs/a"]) == ExitCode.OK
    stand_in(monkeypatch, "demo", run=demo)
    assert main(["demo", "--folder", "here"]) == ExitCode.OK
    assert export[0][0][:2] == (Path("runs/a"), Path("out"))
    assert import_[0][0][:2] == (Path("out"), Path("back"))
    assert demo[0][0] == (Path("here"),)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "wrote out"
    assert said[1] == (
        "wrote back; next: `pytrain prepare --tokenizer back/tokenizer/tokenizer.model --out PREFIX TEXT...`, "
        "name PREFIX under [data] in back/run.toml, then `pytrain train back --resume auto`"
    )
    assert said[2] == "3 tensors"


def test_an_import_without_a_tokenizer_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = ImportedRun(Path("back/checkpoints/step-000000"), Path("back/run.toml"), None, ("bf16", "fp32"))
    monkeypatch.setattr("pytrain.checkpoint.huggingface.import_huggingface", Calls(made))
    assert main(["import", "--hf", "out", "--out", "back"]) == ExitCode.OK
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "note: the tensors are of bf16 and fp32; all become fp32, which loses nothing"
    assert "next: name a tokenizer under [tokenizer], and a corpus that was" in said[1]


def test_bench_passes_its_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Calls()
    stand_in(monkeypatch, "bench.step", main=bench)
    assert main(["bench", "step", "--steps", "3"]) == ExitCode.OK
    assert bench[0][0] == (["--steps", "3"],)


@pytest.mark.parametrize(("shell", "sign"), [("bash", "complete -o"), ("zsh", "#compdef"), ("fish", "complete --")])
def test_completion(shell: str, sign: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == ExitCode.OK
    shown = capsys.readouterr().out
    assert sign in shown
    assert "_PYTRAIN_COMPLETE" in shown


def test_completion_knows_commands_and_presets() -> None:
    from click.shell_completion import ShellComplete

    from pytrain.cli.root import root

    complete = ShellComplete(root, {}, "pytrain", "_PYTRAIN_COMPLETE")
    assert {item.value for item in complete.get_completions([], "ex")} == {"export"}
    found = {item.value for item in complete.get_completions(["init", "--preset"], "llama")}
    assert found == {name for name in PRESETS if name.startswith("llama")}


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        (
            "import pytrain",
            "click pydantic rich numpy sentencepiece safetensors mpi4py tokenizers zstandard torch",
        ),
        ("import pytrain.__main__", "click pydantic rich sentencepiece safetensors mpi4py torch"),
        (
            "from pytrain.__main__ import main; main(['--help'])",
            "pydantic rich numpy sentencepiece mpi4py torch",
        ),
        ("from pytrain.__main__ import main; main(['config'])", "rich numpy sentencepiece mpi4py torch"),
    ],
)
def test_heavy_libraries_are_imported_on_need_only(code: str, absent: str) -> None:
    result = python(
        f"import sys\n{code}\nfound = sys.modules.keys() & set({absent!r}.split())\nassert not found, found"
    )
    assert result.returncode == 0, result.stderr


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    command = f"{sys.executable} -m pytrain config | {sys.executable} -c 'pass'"
    result = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.stderr == ""


def test_the_command_exits_with_its_status() -> None:
    command = [sys.executable, "-m", "pytrain", "config", "nonsense.key"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith('error: "nonsense.key" is not a key')


def test_info_says_what_would_move_messages_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == ExitCode.OK
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("MPI progress:"))
    assert line.split()[2] in ("thread:", "test:")
    assert " 1 rank with " in line
