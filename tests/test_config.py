"""The configuration: what is accepted, what is refused, and in which words."""

import random
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pytrain import config
from pytrain.config.explain import all_keys
from pytrain.config.load import SECTIONS
from pytrain.errors import UserError
from pytrain.presets import PRESETS

MINIMAL = """
[run]
folder = "runs/a"
steps = 100
[model]
preset = "llama-tiny"
[tokenizer]
path = "tokenizer.model"
[data]
train = "corpus/train"
sequence_length = 64
[batch]
micro_batch = 2
global_batch = 8
[learning_rate]
peak = 1e-3
"""


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(MINIMAL, encoding="utf-8")
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        config.load(path, overrides)
    return str(caught.value)


def test_defaults_follow_from_what_is_given(minimal: Path) -> None:
    run = config.load(minimal)
    assert (run.model.family, run.model.kv_heads, run.model.head_size, run.model.tied_head) == (
        "llama",
        2,
        16,
        False,
    )
    assert run.learning_rate.minimum == pytest.approx(1e-4)
    assert run.data.train == (config.Corpus(prefix="corpus/train", weight=1.0, name="train"),)
    assert run.precision.loss_scale == 1.0
    assert config.load(minimal, ["precision.dtype=fp16"]).precision.loss_scale == 65536.0
    assert (run.micro_batches, run.step_tokens) == (4, 512)
    assert run.recompute.of_stage(3) == "none"


def test_a_gpt2_needs_five_keys() -> None:
    model = config.ModelConfig(family="gpt2", layers=2, hidden=48, heads=4, vocabulary=99, context=32)
    assert (model.kv_heads, model.head_size, model.ffn, model.tied_head) == (4, 12, 192, True)


def test_an_override_of_a_preset_moves_what_follows_from_it(minimal: Path) -> None:
    model = config.load(minimal, ["model.preset=gpt2-tiny", "model.hidden=96"]).model
    assert (model.hidden, model.head_size, model.ffn) == (96, 24, 384)


def test_it_cannot_be_changed(minimal: Path) -> None:
    run = config.load(minimal)
    with pytest.raises(ValidationError, match="frozen"):
        run.run.steps = 5
    assert hash(run) == hash(config.load(minimal))


def test_everything_wrong_is_reported_at_once(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(
        """
        [run]
        folder = 3
        steps = 1e3
        [model]
        family = "gpt2"
        hiden = 5
        hidden = 100
        heads = 3
        layers = -1
        vocabulary = 100
        context = 64
        dropout = 0.1
        micro_batch = 3
        [tokenizer]
        [data]
        train = [{prefix = "a", wieght = 2}, "b"]
        sequence_length = 128
        [batch]
        micro_batch = 4
        global_batch = 7
        [lerning_rate]
        [learning_rate]
        peak = "1e-4"
        schedule = "cosin"
        [parallel]
        tp = 4
        [deterministic]
        """,
        encoding="utf-8",
    )
    assert refusal(path, "batch.micro_batch=x", "run.seed=-1").splitlines() == [
        f"{path} has 16 problems:",
        "  [lerning_rate] is not a section; did you mean [learning_rate]?",
        '  "deterministic" is not a section; did you mean run.deterministic?',
        '  run.folder must be text in quotes, not 3; write "3"',
        "  run.steps must be a whole number, not 1000.0; write 1000",
        "  --set run.seed=-1: run.seed must be at least 0, not -1",
        "  model.dropout is 0.1, and only 0 is possible: everything random is counter-based, so that a run "
        "repeats on any grid, and there is no dropout; remove it",
        "  model.layers must be more than 0, not -1",
        "  model.hiden is not a key; did you mean model.hidden?",
        "  model.micro_batch is not a key; did you mean batch.micro_batch?",
        "  model.hidden (100) is not divisible by model.heads (3); change one of them, or set model.head_size",
        "  tokenizer.path is missing; `pytrain config tokenizer.path` says what it is",
        "  data.train.0.wieght is not a key; did you mean data.train.0.weight?",
        "  data.sequence_length (128) is longer than model.context (64); shorten it or raise model.context",
        '  --set batch.micro_batch=x: batch.micro_batch must be a whole number, not "x"',
        '  learning_rate.peak must be a number, not "1e-4"; write 0.0001 without quotes',
        '  learning_rate.schedule must be one of "cosine", "linear", "wsd", "constant", not "cosin"; '
        'did you mean "cosine"?',
    ]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["model.hidden=63"],
            "model.hidden (63) is not divisible by model.heads (4); change one of them, or set",
        ),
        (
            ["model.kv_heads=3"],
            "model.heads (4) is not divisible by model.kv_heads (3); kv_heads may be 1, 2, 4",
        ),
        (["model.head_size=15"], "model.head_size (15) is odd"),
        (["model.preset=gpt2-tiny", "model.rope_theta=5e5"], 'model.family "gpt2" has learned positions'),
        (["model.preset=gtp2-tiny"], 'model.preset "gtp2-tiny" is not known; did you mean "gpt2-tiny"?'),
        (["model.preset=bert"], 'model.preset "bert" is not known; there are gpt2-124m, gpt2-1.5b'),
        (["model.preset=3"], "model.preset 3 is not known"),
        (["model.dropout=0.1"], "model.dropout is 0.1, and only 0 is possible"),
        (
            ["model.rope_scaling.factor=8.0"],
            "model.rope_scaling.low_freq_factor is missing; `pytrain config model.r",
        ),
        (["data.sequence_length=65"], "data.sequence_length (65) is longer than model.context (64)"),
        (
            ["batch.global_batch=7"],
            "is not divisible by batch.micro_batch * parallel.dp (2 * 1); with this dp it may be 6 or 8",
        ),
        (
            ["batch.global_batch=1"],
            "is not divisible by batch.micro_batch * parallel.dp (2 * 1); with this dp it may be 2",
        ),
        (
            ["batch.global_batch=24", "parallel.dp=5"],
            "(2 * 5); with this dp it may be 20 or 30, and with this batch parallel.dp may be 4 or 6",
        ),
        (
            ["batch.global_batch=6", "parallel.dp=8"],
            "(2 * 8); with this dp it may be 16, and with this batch parallel.dp may be 3",
        ),
        (["batch.global_batch=7", "parallel.dp=2"], "(2 * 2); with this dp it may be 4 or 8"),
        (["learning_rate.warmup_steps=101"], "learning_rate.warmup_steps (101) is more than run.steps (100)"),
        (["learning_rate.minimum=0.01"], "learning_rate.minimum (0.01) is above learning_rate.peak (0.001)"),
        (["learning_rate.decay_steps=5"], 'learning_rate.decay_steps only belongs to schedule "wsd"'),
        (["learning_rate.schedule=wsd"], "learning_rate.decay_steps is missing"),
        (
            ["learning_rate.schedule=wsd", "learning_rate.decay_steps=60", "learning_rate.warmup_steps=41"],
            "together are more than run.steps (100)",
        ),
        (["precision.master=bf16"], 'precision.master "bf16" is no wider than precision.dtype "fp32"'),
        (
            ["precision.loss_scale=8.0"],
            'precision.loss_scale (8) is for "fp16", and precision.dtype is "fp32"',
        ),
        (['recompute.policy=["none", "full"]'], "recompute.policy has 2 entries"),
        (
            ["recompute.policy=half"],
            'recompute.policy.0 must be one of "none", "selective", "full", not "half"',
        ),
        (["checkpoint.every=10", "checkpoint.keep_every=25"], "of checkpoint.every (10); 20 would be"),
        (["evaluation.every=5"], "evaluation.every is 5, but data.heldout is empty"),
        (["sample.every=5"], "sample.every is 5, but sample.prompts is empty"),
        (
            ["sample.every=5", 'sample.prompts=["a"]', "parallel.pp=2"],
            "sample.every is 5, but with parallel.pp 2 no rank holds all layers",
        ),
        (
            ["parallel.zero=2", "parallel.pp=2", "parallel.schedule=zero-bubble"],
            'parallel.zero 2 does not go with schedule "zero-bubble"',
        ),
        (
            ["parallel.zero=3", "parallel.dp=2", "sample.every=5", 'sample.prompts=["a"]'],
            "no rank holds the whole model with parallel.zero 3",
        ),
        (
            ["precision.gradient_reduction=fp16", "precision.gradients=bf16"],
            "are two 16-bit types, and neither holds what the other does",
        ),
        (
            ["parallel.sequence_parallel=true", "parallel.tp=9", "batch.micro_batch=1", "data.sequence_length=8"],
            "parallel.sequence_parallel splits the 8 tokens of a micro-batch (batch.micro_batch * "
            "data.sequence_length) over parallel.tp (9) ranks",
        ),
        (["parallel.chunks=2"], 'parallel.chunks is 2, but only schedule "interleaved" has several per rank'),
        (['parallel.schedule="interleaved"'], "must both be at least 2 for interleaved"),
        (["parallel.pp=2", "parallel.stage_layers=[1]"], "[1] must have parallel.pp * parallel.chunks = 2 entries"),
        (["parallel.pp=2", "parallel.stage_layers=[1, 2]"], "that add up to model.layers (2)"),
        (["parallel.pp=2", "parallel.stage_layers=[2, 0]"], "entries of at least 1"),
        (
            ["parallel.pp=2", 'parallel.schedule="zero-bubble"', 'recompute.policy="full"'],
            'recompute.policy "full" does not go with schedule "zero-bubble"',
        ),
        (["run.device=cuda"], 'run.device must be one of "cpu", "hip", not "cuda"'),
        (
            ["run.device=hip", "model.head_size=264"],
            'run.device "hip" has attention for heads of up to 256 channels, and model.head_size is 264',
        ),
        (["run.deterministic=false"], "run.deterministic must be true, not false"),
        (["run.seed=true"], "run.seed must be a whole number, not true"),
        (['data.document_boundaries="true"'], 'must be true or false, not "true"; write true without quotes'),
        (["data.train=[]"], "data.train is empty"),
        (["data.train=3"], "data.train must be a list, not 3"),
        (['data.train=["x/a", "y/a"]'], 'data.train has two corpora named "a"'),
        (["run=3"], "--set run=3 is not of the form section.key=value"),
        (["run.steps"], "--set run.steps is not of the form section.key=value"),
        (["run.steps.x=3"], "--set run.steps.x=3: run.steps is a value, not a table"),
        (["run.steps=nan"], "run.steps must be a whole number, not nan"),
        (["optimizer.eps=inf"], "optimizer.eps"),
    ],
)
def test_refusals(minimal: Path, overrides: list[str], sentence: str) -> None:
    message = refusal(minimal, *overrides)
    assert sentence in message
    assert ("\n" in message) == (" problems:" in message)


@pytest.mark.parametrize(
    ("key", "index", "found"), [("data.train.0.weight", 0, 2.0), ("data.train.1.weight", 1, 3.0)]
)
def test_overrides_reach_into_lists(tmp_path: Path, key: str, index: int, found: float) -> None:
    path = tmp_path / "run.toml"
    path.write_text(MINIMAL.replace('"corpus/train"', '[{prefix = "a"}, {prefix = "b"}]'), encoding="utf-8")
    assert config.load(path, [f"{key}={found}"]).data.train[index].weight == found
    assert "there is no 2" in refusal(path, "data.train.2.weight=1")


def test_an_override_that_is_not_toml_is_text(minimal: Path) -> None:
    assert config.load(minimal, ["run.folder=runs/b=c"]).run.folder == "runs/b=c"
    assert config.load(minimal, ['run.folder="3"']).run.folder == "3"


@pytest.mark.parametrize("tp", [1, 2])
def test_sequence_parallelism_is_accepted(minimal: Path, tp: int) -> None:
    """Of one rank too, for which it is nothing: a configuration need not change with its grid."""
    found = config.load(minimal, ["parallel.sequence_parallel=true", f"parallel.tp={tp}"])
    assert (found.parallel.sequence_parallel, found.parallel.tp) == (True, tp)


def test_dropout_of_zero_is_accepted(minimal: Path) -> None:
    assert config.load(minimal, ["model.dropout=0.0"]) == config.load(minimal)


def test_unreadable_files(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    assert refusal(path).startswith(f"{path} does not exist; `pytrain init")
    path.write_text("[run]\nsteps 3\n", encoding="utf-8")
    message = refusal(path)
    assert message.startswith(f"{path} is not valid TOML")
    assert "line 2" in message
    path.write_bytes(b"[run]\nname = '\xff'\n")
    assert refusal(path) == f"{path} is not UTF-8 text: byte 14 is 0xff"


def test_a_run_folder_stands_for_its_run_toml(minimal: Path) -> None:
    assert config.load(minimal.parent) == config.load(minimal)


def test_a_missing_section_lists_its_keys(tmp_path: Path) -> None:
    path = tmp_path / "empty.toml"
    path.write_text("", encoding="utf-8")
    message = refusal(path)
    required = [key.name for key in all_keys() if key.default is None and key.name.count(".") == 1]
    # what follows from family and preset cannot be missed before they are known
    for name in required:
        assert f"{name} is missing" in message


@pytest.mark.parametrize("preset", PRESETS)
def test_init_and_resolved_files_load_to_the_same(tmp_path: Path, preset: str) -> None:
    path = tmp_path / "run.toml"
    text = config.commented_toml(preset)
    path.write_text(text, encoding="utf-8")
    run = config.load(path)
    assert run.model == config.build_model({"preset": preset})
    assert max(map(len, text.splitlines())) <= 100
    resolved = tmp_path / "resolved.toml"
    resolved.write_text(config.resolved_toml(run), encoding="utf-8")
    assert config.load(resolved) == run
    # taking away every # in front of a key changes nothing: the defaults shown are the defaults
    path.write_text(
        "\n".join(
            line[1:] if line.startswith("#") and line[1] != " " and "(not set)" not in line else line
            for line in text.splitlines()
        ),
        encoding="utf-8",
    )
    assert config.load(path) == run


def test_random_configurations_survive_writing(minimal: Path, tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    for _ in range(30):
        heads, micro_batch, every = draw.randint(1, 9), draw.randint(1, 9), draw.randint(1, 50)
        peak = draw.uniform(1e-6, 1.0)
        text = "".join(draw.choice('a"\\\n\t日€\x7f ') for _ in range(8))
        run = config.build(
            {
                "run": {"folder": text, "steps": draw.randint(50, 10**9), "seed": draw.randrange(2**63)},
                "model": {
                    "family": "llama",
                    "layers": draw.randint(1, 99),
                    "hidden": heads * 2 * draw.randint(1, 99),
                    "heads": heads,
                    "ffn": draw.randint(1, 999),
                    "vocabulary": draw.randint(1, 2**31 - 1),
                    "context": draw.randint(8, 99),
                    "rope_scaling": {
                        "factor": draw.uniform(1, 9),
                        "low_freq_factor": 1.0,
                        "high_freq_factor": draw.uniform(1, 9),
                        "original_max_position_embeddings": 8192,
                    },
                },
                "tokenizer": {"path": text},
                "data": {
                    "train": [{"prefix": f"{text}{index}", "weight": draw.uniform(0.1, 9)} for index in range(3)],
                    "heldout": [text],
                    "sequence_length": draw.randint(1, 8),
                },
                "batch": {"micro_batch": micro_batch, "global_batch": micro_batch * draw.randint(1, 9)},
                "learning_rate": {
                    "peak": peak,
                    "minimum": peak * draw.random(),
                    "warmup_steps": draw.randint(0, 50),
                },
                "precision": {"dtype": draw.choice(["fp32", "bf16", "fp16"])},
                "recompute": {"policy": draw.choice(["none", "selective", "full"])},
                "checkpoint": {"every": every, "keep_every": every * draw.randint(0, 3)},
                "sample": {"prompts": [text, ""], "every": draw.randint(0, 5)},
            }
        )
        path = tmp_path / "resolved.toml"
        path.write_text(config.resolved_toml(run), encoding="utf-8")
        assert config.load(path) == run


WRONG: tuple[Any, ...] = (
    "text",
    -1,
    0,
    2.5,
    True,
    False,
    [],
    {},
    ["x"],
    {"x": 1},
    [[]],
    10**30,
    float("nan"),
)


def complaint(data: dict[str, Any]) -> str | None:
    try:
        config.build(data)
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", SECTIONS)
def test_any_value_anywhere_is_accepted_or_refused_by_name(minimal: Path, name: str) -> None:
    whole: dict[str, Any] = config.load(minimal).model_dump(mode="json", exclude_none=True)
    accepted = 0
    for key in [*whole[name], "dropout", "preset", "nonsense"]:
        for value in WRONG:
            message = complaint({**whole, name: {**whole[name], key: value}})
            assert message is None or f"{name}.{key}" in message
            accepted += message is None
    for value in WRONG:
        if not isinstance(value, dict):
            with pytest.raises(UserError, match=name):
                config.build({**whole, name: value})
    assert accepted < len(WRONG) * len(whole[name])


def test_a_model_alone_is_checked_too() -> None:
    with pytest.raises(UserError, match=r"^config.json: model.hidden \(5\) is not divisible by model.heads \(2\)"):
        config.build_model(
            {"family": "gpt2", "layers": 1, "hidden": 5, "heads": 2, "vocabulary": 9, "context": 9},
            "config.json",
        )
    with pytest.raises(ValidationError, match="not divisible"):
        config.ModelConfig(family="gpt2", layers=1, hidden=5, heads=2, vocabulary=9, context=9)


def test_a_llama_has_to_say_its_ffn() -> None:
    with pytest.raises(UserError, match=r"model.ffn is missing .* usual for hidden = 4096 is 11008$"):
        config.build_model(
            {"family": "llama", "layers": 1, "hidden": 4096, "heads": 32, "vocabulary": 9, "context": 9}
        )


def test_every_key_is_explained() -> None:
    listing = config.explain(None)
    for key in all_keys():
        assert key.description.endswith("."), key.name
        assert key.name in listing
        assert key.description.split()[0] in config.explain(key.name)
    for name, section in SECTIONS.items():
        text = config.explain(name)
        assert all(f"{name}.{key}" in text for key in section.model_fields)


@pytest.mark.parametrize(
    ("asked", "advice"),
    [
        ("model.hiden", "model.hidden"),
        ("peak", "learning_rate.peak"),
        ("modell", "model"),
        ("lerning_rate", "learning_rate"),
    ],
)
def test_an_unknown_key_is_not_explained(asked: str, advice: str) -> None:
    with pytest.raises(UserError, match=f'did you mean "{advice}"'):
        config.explain(asked)
