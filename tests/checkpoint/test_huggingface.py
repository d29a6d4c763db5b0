"""Weights out to Hugging Face form and in again, through the safetensors library; no torch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from numpy.typing import NDArray

from pytrain.checkpoint import Checkpoint, TensorPiece
from pytrain.checkpoint.huggingface import export_huggingface, import_huggingface
from pytrain.checkpoint.parameters import weight_entries
from pytrain.config import build_model, load
from pytrain.errors import UserError
from tests import reference
from tests.huggingface_cases import GPT2, LLAMA, MODELS, model, random_weights, save_weights

NUMPY = {"fp32": np.float32, "fp16": np.float16}


def file_bytes(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Dtype, shape and bytes of every tensor in a folder, read without our code."""
    found = {}
    for path in folder.glob("*.safetensors"):
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        for name, entry in json.loads(content[8 : 8 + length]).items():
            if name != "__metadata__":
                begin, end = (8 + length + offset for offset in entry["data_offsets"])
                found[name] = (entry["dtype"], tuple(entry["shape"]), content[begin:end])
    return found


@pytest.mark.parametrize("name", MODELS)
def test_parameter_table_is_the_reference_one(name: str) -> None:
    shape = model(name)
    entries = weight_entries(shape, "fp32")
    values = shape.model_dump(exclude={"init_std"})
    assert {entry.tensor: entry.shape for entry in entries} == reference.parameter_shapes(reference.Shape(**values))
    assert [entry.tensor for entry in entries] == list(reference.parameter_shapes(reference.Shape(**values)))
    for entry in entries:
        layer = re.match(r"layer\.(\d+)\.", entry.tensor)
        bucket = f"layer_{int(layer[1]):03d}" if layer else "embed" if entry.tensor.startswith("embed") else "head"
        assert entry.file == f"{bucket}.weights"


@pytest.mark.parametrize("name", MODELS)
def test_parameter_table_is_the_native_one(name: str) -> None:
    from pytrain.native import native
    from pytrain.stage import native_shape

    shape = model(name)
    operations = native_shape(shape)
    layout = native().Layout(operations, 0, operations.op_count)
    table = [(f"{layout.buckets[spec.bucket].name}.weights", spec.name, spec.shape) for spec in layout.tensors]
    assert [(entry.file, entry.tensor, entry.shape) for entry in weight_entries(shape, "fp32")] == table


def expected_llama(weights: dict[str, NDArray[Any]], layers: int) -> dict[str, NDArray[Any]]:
    """The transformers tensors written out by hand, not through the table."""
    theirs = {
        "model.embed_tokens.weight": weights["embed.tokens"],
        "model.norm.weight": weights["final_norm.weight"],
    }
    if "head.weight" in weights:
        theirs["lm_head.weight"] = weights["head.weight"]
    for layer in range(layers):
        ours, block = f"layer.{layer}.", f"model.layers.{layer}."
        theirs[block + "input_layernorm.weight"] = weights[ours + "norm1.weight"]
        theirs[block + "post_attention_layernorm.weight"] = weights[ours + "norm2.weight"]
        for part in "qkv":
            theirs[f"{block}self_attn.{part}_proj.weight"] = weights[f"{ours}attention.{part}.weight"]
        theirs[block + "self_attn.o_proj.weight"] = weights[ours + "attention.out.weight"].T
        theirs[block + "mlp.gate_proj.weight"] = weights[ours + "mlp.gate.weight"]
        theirs[block + "mlp.up_proj.weight"] = weights[ours + "mlp.up.weight"]
        theirs[block + "mlp.down_proj.weight"] = weights[ours + "mlp.down.weight"].T
    return theirs


def expected_gpt2(weights: dict[str, NDArray[Any]], layers: int) -> dict[str, NDArray[Any]]:
    theirs = {
        "transformer.wte.weight": weights["embed.tokens"],
        "transformer.wpe.weight": weights["embed.positions"],
    }
    if "head.weight" in weights:
        theirs["lm_head.weight"] = weights["head.weight"]
    for kind in ("weight", "bias"):
        theirs[f"transformer.ln_f.{kind}"] = weights[f"final_norm.{kind}"]
        for layer in range(layers):
            ours, block = f"layer.{layer}.", f"transformer.h.{layer}."
            theirs[f"{block}ln_1.{kind}"] = weights[f"{ours}norm1.{kind}"]
            theirs[f"{block}ln_2.{kind}"] = weights[f"{ours}norm2.{kind}"]
            theirs[f"{block}attn.c_attn.{kind}"] = np.concatenate(
                [weights[f"{ours}attention.{part}.{kind}"].T for part in "qkv"], axis=-1
            )
            theirs[f"{block}attn.c_proj.{kind}"] = weights[f"{ours}attention.out.{kind}"]
            theirs[f"{block}mlp.c_fc.{kind}"] = weights[f"{ours}mlp.up.{kind}"].T
            theirs[f"{block}mlp.c_proj.{kind}"] = weights[f"{ours}mlp.down.{kind}"]
    return theirs


def expected_tensors(shape: Any, weights: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    write_out = expected_gpt2 if shape.family == "gpt2" else expected_llama
    return {name: np.ascontiguousarray(value) for name, value in write_out(weights, shape.layers).items()}


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", MODELS)
def test_export_then_import_then_export(tmp_path: Path, name: str, dtype: str) -> None:
    shape = model(name)
    weights = random_weights(shape, dtype, seed=len(name))
    checkpoint = save_weights(tmp_path / "run", shape, dtype, weights)
    seen: list[tuple[int, int]] = []
    folder = export_huggingface(checkpoint, tmp_path / "hf", lambda done, total: seen.append((done, total)))
    theirs = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}[dtype]
    expected = {
        key: (theirs, value.shape, value.tobytes()) for key, value in expected_tensors(shape, weights).items()
    }
    assert file_bytes(folder) == expected
    assert seen[-1] == (sum(len(content) for _, _, content in expected.values()),) * 2

    read: list[tuple[int, int]] = []
    imported = import_huggingface(folder, tmp_path / "again", lambda done, total: read.append((done, total)))
    assert max(read) == seen[-1], "bytes, as the export counts them"
    assert imported.checkpoint == tmp_path / "again" / "checkpoints" / "step-000000"
    again = Checkpoint.open(imported.checkpoint)
    again.verify()
    assert again.step == 0
    for key, value in weights.items():
        assert again.read(key).tobytes() == value.tobytes(), key
    assert set(again.tensors()) == set(weights)
    run = load(imported.run_toml)
    assert run.model == shape
    assert run.precision.dtype == dtype
    assert again.config_text == imported.run_toml.read_text(encoding="utf-8")
    assert file_bytes(export_huggingface(again, tmp_path / "hf2")) == expected


def test_shards(tmp_path: Path) -> None:
    shape = model("llama")
    weights = random_weights(shape, "fp32", seed=9)
    checkpoint = save_weights(tmp_path / "run", shape, "fp32", weights)
    whole = export_huggingface(checkpoint, tmp_path / "whole")
    assert [path.name for path in whole.glob("*.safetensors*")] == ["model.safetensors"]
    folder = export_huggingface(checkpoint, tmp_path / "shards", shard_bytes=9000)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 3
    assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    assert file_bytes(folder) == file_bytes(whole)
    for name in files:
        header = int.from_bytes((folder / name).read_bytes()[:8], "little")
        assert (folder / name).stat().st_size - 8 - header <= 9000
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in weights.values())
    for name, file in index["weight_map"].items():
        with safetensors.safe_open(folder / file, framework="numpy") as opened:
            assert name in opened.keys()  # noqa: SIM118 (not a mapping)
    imported = import_huggingface(folder, tmp_path / "again")
    for key, value in weights.items():
        assert Checkpoint.open(imported.checkpoint).read(key).tobytes() == value.tobytes()
    (folder / files[1]).unlink()
    with pytest.raises(UserError, match=f"^.*/{files[1]} is missing, but model.safetensors.index.json lists it$"):
        import_huggingface(folder, tmp_path / "missing")


def write_model(folder: Path, config: dict[str, Any], tensors: dict[str, NDArray[Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


GPT2_CONFIG = {
    "model_type": "gpt2", "vocab_size": 37, "n_positions": 19, "n_embd": 24, "n_layer": 2, "n_head": 3,
    "n_inner": 40, "bos_token_id": 36, "eos_token_id": 36,
}  # fmt: skip
LLAMA_CONFIG = {
    "model_type": "llama", "vocab_size": 37, "hidden_size": 24, "intermediate_size": 28,
    "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10,
    "max_position_embeddings": 64, "rope_theta": 500000.0,
}  # fmt: skip


def test_gpt2_as_the_hub_has_it(tmp_path: Path) -> None:
    """No "transformer." in the names, and buffers among the weights."""
    shape = build_model(GPT2)
    weights = random_weights(shape, "fp32", seed=3)
    tensors = {name.removeprefix("transformer."): value for name, value in expected_tensors(shape, weights).items()}
    for layer in range(2):
        tensors[f"h.{layer}.attn.bias"] = np.ones((1, 1, 19, 19), np.uint8)
        tensors[f"h.{layer}.attn.masked_bias"] = np.array(-1e4, np.float32)
    imported = import_huggingface(write_model(tmp_path / "hf", GPT2_CONFIG, tensors), tmp_path / "run")
    checkpoint = Checkpoint.open(imported.checkpoint)
    for key, value in weights.items():
        np.testing.assert_array_equal(checkpoint.read(key), value, err_msg=key)
    assert imported.tokenizer is None
    assert checkpoint.state["huggingface"] == {"bos_token_id": 36, "eos_token_id": 36, "pad_token_id": None}
    exported = json.loads((export_huggingface(checkpoint, tmp_path / "out") / "config.json").read_text())
    assert (exported["bos_token_id"], exported["eos_token_id"]) == (36, 36)


def llama_tensors(seed: int = 3) -> dict[str, NDArray[Any]]:
    shape = build_model(LLAMA)
    return expected_tensors(shape, random_weights(shape, "fp32", seed))


def test_llama_with_old_buffers_and_a_list_of_ends(tmp_path: Path) -> None:
    tensors = llama_tensors()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(5, np.float32)
    config = LLAMA_CONFIG | {"eos_token_id": [2, 5], "pretraining_tp": 4, "attention_dropout": 0.1}
    imported = import_huggingface(write_model(tmp_path / "hf", config, tensors), tmp_path / "run")
    assert imported.widened == ()
    checkpoint = Checkpoint.open(imported.checkpoint)
    exported = json.loads((export_huggingface(checkpoint, tmp_path / "out") / "config.json").read_text())
    assert exported["eos_token_id"] == [2, 5]
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [2, 5]}


def test_tied_head_may_be_stored_twice_but_not_differ(tmp_path: Path) -> None:
    tensors = llama_tensors()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    config = LLAMA_CONFIG | {"tie_word_embeddings": True}
    imported = import_huggingface(write_model(tmp_path / "hf", config, tensors), tmp_path / "run")
    assert "head.weight" not in Checkpoint.open(imported.checkpoint).tensors()
    tensors["lm_head.weight"][0, 0] += 1
    with pytest.raises(
        UserError, match=r"lm_head.weight differs from model.embed_tokens.weight, but config.json ties"
    ):
        import_huggingface(write_model(tmp_path / "hf", config, tensors), tmp_path / "run2")


def test_norms_of_another_type_make_the_whole_model_fp32(tmp_path: Path) -> None:
    """As a training that kept norms in fp32 leaves it; pytrain trains in one type, and fp32 holds all others."""
    tensors = llama_tensors()
    mixed: dict[str, NDArray[Any]] = {
        name: value if "norm" in name else value.astype(np.float16) for name, value in tensors.items()
    }
    imported = import_huggingface(write_model(tmp_path / "hf", LLAMA_CONFIG, mixed), tmp_path / "run")
    assert imported.widened == ("fp16", "fp32")
    assert load(imported.run_toml).precision.dtype == "fp32"
    out = file_bytes(export_huggingface(Checkpoint.open(imported.checkpoint), tmp_path / "out"))
    assert {name: dtype for name, (dtype, _, _) in out.items()} == dict.fromkeys(tensors, "F32")
    for name, value in mixed.items():
        assert out[name][2] == value.astype(np.float32).tobytes(), name


def refuse(tmp_path: Path, config: dict[str, Any], tensors: dict[str, NDArray[Any]], pattern: str) -> None:
    with pytest.raises(UserError) as caught:
        import_huggingface(write_model(tmp_path / "hf", config, tensors), tmp_path / "run")
    assert re.fullmatch(pattern, str(caught.value)), str(caught.value)
    assert not (tmp_path / "run").exists()


def test_bad_tensors(tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.o_proj.weight"
    tensors = llama_tensors()
    tensors[name] = np.ascontiguousarray(tensors[name].T)
    refuse(
        tmp_path, LLAMA_CONFIG, tensors,
        rf".*/model.safetensors: {name} has shape \[60, 24\], but config.json makes it \[24, 60\]",
    )  # fmt: skip
    del tensors[name]
    refuse(tmp_path, LLAMA_CONFIG, tensors, f".*/hf has no tensor {name}")
    tensors = llama_tensors()
    tensors[name] = tensors[name].astype(np.float64)
    refuse(tmp_path, LLAMA_CONFIG, tensors, f".*: {name} is F64, and pytrain keeps F32, BF16, F16")
    tensors = llama_tensors() | {"model.layers.0.self_attn.q_proj.bias": np.ones(60, np.float32)}
    refuse(
        tmp_path, LLAMA_CONFIG, tensors,
        ".* holds the tensor model.layers.0.self_attn.q_proj.bias, which has no place in a llama .*",
    )  # fmt: skip


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no config.json, so it is not a model in Hugging Face form$"):
        import_huggingface(tmp_path, tmp_path / "run")
    folder = write_model(tmp_path / "hf", LLAMA_CONFIG, llama_tensors())
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-4])
    with pytest.raises(UserError, match=r"^.*/model.safetensors is not a whole safetensors file: "):
        import_huggingface(folder, tmp_path / "run")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"^.*/hf holds neither model.safetensors nor .*; weights in another format"):
        import_huggingface(folder, tmp_path / "run")
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"^.*/config.json is not JSON: "):
        import_huggingface(folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    shape = model("llama")
    checkpoint = save_weights(tmp_path / "run", shape, "fp32", random_weights(shape, "fp32", seed=1))
    folder = write_model(tmp_path / "hf", LLAMA_CONFIG, llama_tensors())
    with pytest.raises(
        UserError, match=r"^.*/run already holds the checkpoint step-000003; name another run folder$"
    ):
        import_huggingface(folder, tmp_path / "run")
    with pytest.raises(UserError, match=r"^.*/hf exists already; name a folder that does not$"):
        export_huggingface(checkpoint, folder)


def test_export_of_a_damaged_or_incomplete_checkpoint(tmp_path: Path) -> None:
    shape = model("llama")
    weights = random_weights(shape, "fp32", seed=1)
    checkpoint = save_weights(tmp_path / "run", shape, "fp32", weights)
    path = checkpoint.folder / "head.weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(UserError, match=r"of head.weight, are not those that were written$"):
        export_huggingface(checkpoint, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
    other = build_model(LLAMA | {"layers": 3})
    incomplete = save_weights(tmp_path / "other", other, "fp32", random_weights(other, "fp32", seed=1))
    text = incomplete.config_text.replace("layers = 3", "layers = 4")
    with pytest.raises(UserError, match=r"has no tensor layer.3.norm1.weight$"):
        export_huggingface(Checkpoint(incomplete.folder, incomplete.manifest, text), tmp_path / "hf")


def test_optimizer_state_stays_behind(tmp_path: Path) -> None:
    from pytrain.checkpoint import save
    from tests.checkpoint_cases import UnsyncedOperations

    shape = model("gpt2")
    weights = random_weights(shape, "bf16", seed=1)
    plain = save_weights(tmp_path / "plain", shape, "bf16", weights)
    pieces = [TensorPiece(*entry, 0, weights[entry.tensor].ravel()) for entry in weight_entries(shape, "bf16")]
    for entry in weight_entries(shape, "bf16"):
        file = entry.file.replace("weights", "optimizer")
        for kind in ("master", "m", "v"):
            data = np.ones(entry.elements, np.float32)
            pieces.append(TensorPiece(file, f"{entry.tensor}.{kind}", "fp32", entry.shape, 0, data))
    save(tmp_path / "full", 3, pieces, {}, plain.config_text, operations=UnsyncedOperations())
    full = export_huggingface(Checkpoint.open(tmp_path / "full"), tmp_path / "hf full")
    assert file_bytes(full) == file_bytes(export_huggingface(plain, tmp_path / "hf plain"))
